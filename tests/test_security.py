"""What a user may be handed by others runs no code, and what a user alone knows is shown to nobody."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import Tiny, write_encoder
from test_text_encoder import minilm
from trained_adapter import Trained, train_and_export

from tuner.arrow import check_plain
from tuner.config import EncoderRef, LoraSpec, TrialConfig, read_yaml
from tuner.data.manifest import read_manifest
from tuner.data.store import CAPTIONS_FILE, CLIPS_FILE, META_FILE, Store
from tuner.data.tables import EmbeddedAudio, read_audio_bytes
from tuner.encoders.checkpoint import INDEX, SINGLE
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.encoders.text import TextEncoder
from tuner.encoders.text_facts import inspect_text_encoder
from tuner.errors import AdapterError, ConfigError, DataError, EncoderError, StudyError, TunerError
from tuner.study.folder import StudyFolder
from tuner.train.evaluate import load
from tuner.train.pack import Pack, PackContext

TRIAL = TrialConfig(lora=LoraSpec(rank=2, targets=("q_proj",)))


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A file that a bomb would make; nothing may have made it by the end of the test."""
    path = tmp_path / "went-off"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.exists(), "a bomb that does not go off would test nothing"
    path.unlink()
    yield path
    assert not path.exists(), "code of a file was run"


def raises(kind: type[TunerError], said: str, action: Callable[[], object]) -> None:
    """One sentence: no line ends, no name of a Python exception alone."""
    with pytest.raises(kind, match=said) as raised:
        action()
    assert "\n" not in str(raised.value)


# Encoders


def test_pickled_weights_of_an_encoder_are_not_read(tmp_path: Path, mark: Path) -> None:
    """Beside no others, under the name of safe ones, and named by the index of a sharded model."""
    folder = write_encoder(tmp_path / "encoder")
    ref = EncoderRef(source=str(folder))
    bomb = pickle.dumps(Bomb(mark))
    (folder / SINGLE).write_bytes(bomb)
    raises(EncoderError, "damaged safetensors", lambda: load_encoder(inspect_encoder(ref), torch.float32))
    (folder / SINGLE).unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        (folder / name).write_bytes(bomb)
        raises(EncoderError, f"{name} may run code when loaded, so it is not read", lambda: inspect_encoder(ref))
        (folder / INDEX).write_text(json.dumps({"weight_map": {"encoder.conv1.weight": name}}))
        raises(EncoderError, f"'{name}', not safetensors", lambda: inspect_encoder(ref))
        (folder / INDEX).unlink()
        (folder / name).unlink()


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A copy of the demo's text encoder without its weights."""
    copy = tmp_path / "text"
    shutil.copytree(minilm(), copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return copy


def test_pickled_weights_of_a_text_encoder_are_not_read(text_folder: Path, mark: Path) -> None:
    bomb = pickle.dumps(Bomb(mark))
    (text_folder / "pytorch_model.bin").write_bytes(bomb)
    raises(EncoderError, "pytorch_model.bin may run code", lambda: inspect_text_encoder(str(text_folder)))
    (text_folder / INDEX).write_text(json.dumps({"weight_map": {"embeddings.weight": "pytorch_model.bin"}}))
    raises(EncoderError, "not safetensors", lambda: inspect_text_encoder(str(text_folder)))
    (text_folder / INDEX).unlink()
    (text_folder / SINGLE).write_bytes(bomb)
    raises(EncoderError, "transformers cannot load it", lambda: TextEncoder(inspect_text_encoder(str(text_folder))))


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_text_encoder_is_not_run(text_folder: Path, mark: Path, part: str) -> None:
    (text_folder / SINGLE).symlink_to(minilm() / SINGLE)
    (text_folder / "code.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    config = json.loads((text_folder / part).read_text())
    classes = {"AutoConfig": "code.Own", "AutoModel": "code.Own", "AutoTokenizer": ["code.Own", None]}
    config |= {"auto_map": classes, "model_type": "own", "tokenizer_class": "Own"}
    (text_folder / part).write_text(json.dumps(config))
    # transformers refuses a model of unknown kind, and takes its own class for such a tokeniser.
    with contextlib.suppress(EncoderError):
        TextEncoder(inspect_text_encoder(str(text_folder)))


# Adapters


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_and_export(tiny, TRIAL, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def adapter(trained: Trained, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(trained.folder, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "head.safetensors"])
def test_a_pickled_adapter_is_not_read(adapter: Path, mark: Path, file: str) -> None:
    (adapter / file).write_bytes(pickle.dumps(Bomb(mark)))
    raises(AdapterError, f"{file}: (is a )?d", lambda: load(adapter))
    (adapter / file).rename(adapter / "adapter_model.bin")
    raises(AdapterError, f"{file} is missing", lambda: load(adapter))


def test_an_adapter_imports_nothing(adapter: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT imports the module that `megatron_core` names: here one that lies in the folder where a user works."""
    (adapter.parent / "surprise.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    monkeypatch.syspath_prepend(str(adapter.parent))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"megatron_core": "surprise", "megatron_config": {"tensor_model_parallel_size": 1}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    raises(AdapterError, "adapter_config.json: sets megatron_config to", lambda: load(adapter))
    assert "surprise" not in sys.modules


# Studies


@pytest.fixture
def pack(tiny: Tiny) -> Pack:
    return Pack(PackContext(load_encoder(inspect_encoder(tiny.encoder), torch.float32), tiny.store(), tiny.settings()))


@pytest.mark.parametrize("form", ["torch", "pickle", "cut off", "empty", "no checkpoint", "wrong tensors"])
def test_a_checkpoint_runs_nothing(pack: Pack, tmp_path: Path, mark: Path, form: str) -> None:
    """One sentence, which ends its trial and no other, and the adapter is not left in the encoder."""
    path = StudyFolder(tmp_path).checkpoint("t0001")
    member = pack.attach("t0001", TRIAL)
    member.save(path)
    whole, state = path.read_bytes(), member.state()
    pack.detach("t0001")
    if form == "torch":
        torch.save(state | {"history": [Bomb(mark)]}, path)
    elif form == "no checkpoint":
        torch.save([1], path)
    elif form == "wrong tensors":
        torch.save(state | {"lora": state["lora"][:1]}, path)
    else:
        bomb = pickle.dumps(Bomb(mark), protocol=2)
        path.write_bytes({"pickle": bomb, "cut off": whole[: len(whole) // 2], "empty": b""}[form])
    said = "checkpoint of t0001: is damaged" if form == "wrong tensors" else "t0001.pt: not a checkpoint of tensors"
    raises(StudyError, said, lambda: pack.attach("t0001", TRIAL, path))
    assert pack.members == {}
    pack.attach("t0001", TRIAL)


# Arrow: Ray registers a type with pyarrow whose values are unpickled when they are read


@pytest.fixture
def objects(mark: Path) -> pa.Array[Any]:
    """A column of bombs; where Ray Data has been imported, each would go off."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    return ArrowPythonObjectArray.from_objects([Bomb(mark)])


def test_reading_such_a_column_would_run_it(objects: pa.Array[Any], mark: Path) -> None:
    """What the tests below guard against; the day that this fails, the guard may go."""
    objects.to_pylist()
    assert mark.exists()
    mark.unlink()


@pytest.mark.parametrize("column", ["caption", "audio", "clip_id", "split"])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_manifest_runs_nothing(objects: pa.Array[Any], tmp_path: Path, mark: Path, kind: str, column: str) -> None:
    table = pa.table({"audio": ["a.wav"], "caption": ["x"]} | {column: objects})
    path = write_rows(tmp_path / "data", table, kind)
    raises(DataError, f"column `{column}` is of the type ray.data.arrow_pickled_object", lambda: read_manifest(path))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_embedded_audio_runs_nothing(objects: pa.Array[Any], tmp_path: Path, mark: Path, kind: str) -> None:
    """Neither where the manifest is read nor where the bytes are, which is another process."""
    audio = pa.StructArray.from_arrays([objects, pa.array(["a.wav"])], ["bytes", "path"])
    path = write_rows(tmp_path / "data", pa.table({"audio": audio, "caption": ["x"]}), kind)
    file = next(path.rglob("data*.*"))
    said = "column `audio` is of the type ray.data.arrow_pickled_object"
    raises(DataError, said, lambda: read_manifest(path))
    raises(DataError, said, lambda: read_audio_bytes([EmbeddedAudio(file, 0)]))


def test_columns_that_are_not_read_may_be_anything(objects: pa.Array[Any], tmp_path: Path, mark: Path) -> None:
    path = write_rows(tmp_path / "data", pa.table({"audio": ["a.wav"], "caption": ["x"], "more": objects}), "parquet")
    assert [row.captions for row in read_manifest(path)] == [("x",)]


def write_rows(folder: Path, table: pa.Table, kind: str) -> Path:
    """A dataset folder with one file of rows."""
    folder.mkdir()
    if kind == "parquet":
        pq.write_table(table, folder / "data.parquet")
    else:
        with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


@pytest.mark.parametrize(("file", "column"), [(CLIPS_FILE, "clip_id"), (CAPTIONS_FILE, "text")])
def test_a_store_runs_nothing(
    tiny: Tiny, objects: pa.Array[Any], tmp_path: Path, mark: Path, file: str, column: str
) -> None:
    folder = tmp_path / "store"
    shutil.copytree(tiny.store_folder, folder)
    # Not mapped: the file is written again.
    table = pa.ipc.open_file((folder / file).read_bytes()).read_all()
    bombs = pa.concat_arrays([objects] * len(table))
    spoilt = table.set_column(table.schema.get_field_index(column), column, bombs)
    with pa.OSFile(str(folder / file), "wb") as out, pa.ipc.new_file(out, spoilt.schema) as writer:
        writer.write_table(spoilt)
    meta = json.loads((folder / META_FILE).read_text())
    meta["files"][file] = (folder / file).stat().st_size
    (folder / META_FILE).write_text(json.dumps(meta))
    said = f"column `{column}` is of the type ray.data.arrow_pickled_object"
    raises(DataError, said, lambda: Store.open(folder).captions)


def test_plain_types_of_arrows_own_are_read() -> None:
    uuids = pa.array([b"0123456789abcdef"], pa.binary(16)).cast(pa.uuid())
    check_plain(pa.schema({"clip_id": uuids.type, "captions": pa.list_(pa.string())}), Path("x"))


# YAML


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.mkdir ['{mark}']", "!!python/object/new:os.mkdir {{}}"])
def test_yaml_runs_nothing(tmp_path: Path, mark: Path, text: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text.format(mark=mark))
    raises(ConfigError, "space.yaml: is not valid YAML .*could not determine a constructor", lambda: read_yaml(path))


@pytest.mark.parametrize("text", ["? [a]\n: 1", "? {a: 1}\n: 1", "&a [*a]: 1"])
def test_keys_that_cannot_be_keys_are_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    raises(ConfigError, "space.yaml: is not valid YAML", lambda: read_yaml(path))


def test_yaml_that_is_written_holds_plain_values() -> None:
    """What `trial.yaml` and `tuner spaces show` are written with."""
    with pytest.raises(yaml.YAMLError):
        yaml.safe_dump(Bomb(Path("x")))
