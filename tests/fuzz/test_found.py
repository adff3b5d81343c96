"""Inputs that were faults once: each is one sentence, a reject, or an answer now."""

from __future__ import annotations

import io
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml
from conftest import Tiny
from generators import YAML_RAW
from sqlalchemy.engine import make_url
from terminal import Terminal
from test_fuzz_stores import as_file
from trained_adapter import Trained, train_and_export

from tuner.commands.console import LONGEST_LINE
from tuner.config import LoraSpec, TrialConfig, read_yaml
from tuner.data.audio import UnusableAudioError, decode
from tuner.data.manifest import read_manifest
from tuner.data.store import META_FILE, Store
from tuner.data.writer import only_writer
from tuner.errors import ConfigError, DataError, SpaceError, StudyError
from tuner.near import shown
from tuner.patience import PATIENCE_VARIABLE, Patience
from tuner.redact import printable, redact
from tuner.search.durable.database import PatientStorage, open_database
from tuner.space import SearchSpace

# YAML


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("9" * 5_000, "is not of the type int"),
        ("0x" + "f" * 5_000, "does not fit into 64 bits"),
        ("9" * 19, "does not fit into 64 bits"),
        ("2026-02-30", "'2026-02-30' is not of the type timestamp"),
        ("2026-01-01 25:61:61", "is not of the type timestamp"),
        ("!!int x", "'x' is not of the type int"),
        ('!!int ""', "'' is not of the type int"),
        ("!!float x", "'x' is not of the type float"),
        ("!!bool x", "'x' is not of the type bool"),
        ("!!timestamp x", "'x' is not of the type timestamp"),
        ("[" * 10_000 + "]" * 10_000, "nested too deeply"),
        ("[" * 10_000, "nested too deeply"),
        ('{"a": ' * 10_000 + "1" + "}" * 10_000, "nested too deeply"),
        ("*" + "x" * 10_000, "found undefined alias"),
        ("!" + "x" * 10_000 + " 1", "could not determine a constructor"),
    ],
)
def test_yaml_that_python_cannot_hold(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"a: {text}\n")
    with pytest.raises(ConfigError, match=f"mine.yaml: is not valid YAML .*{said}") as raised:
        read_yaml(path)
    assert len(str(raised.value)) < 600


def test_a_list_that_holds_itself_or_very_many(tmp_path: Path) -> None:
    """Written out it would take all memory."""
    for text in (YAML_RAW["@itself@"], YAML_RAW["@laughs@"]):
        (tmp_path / "mine.yaml").write_text(f"name: mine\ndescription: {text}\ndimensions: {{}}\n")
        with pytest.raises(SpaceError, match=r"mine.yaml: description cannot be \[") as raised:
            SearchSpace.from_file(tmp_path / "mine.yaml")
        assert len(str(raised.value)) < 500
    assert shown([["x"] * 3] * 2) == "[['x', 'x', 'x'], ['x', 'x', 'x']]"
    assert shown("x" * 10**6) == "'" + "x" * 59 + "..."


def test_a_configuration_with_many_errors_names_some(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        TrialConfig.parse({"x" * 1_000 + str(number): [0] * 10**6 for number in range(50)}, "here")
    assert str(raised.value).endswith("; and 44 more") and len(str(raised.value)) < 1_500


# Words of any length


@pytest.mark.parametrize("word", ["a" * 120_000, "a://b:" * 20_000, "?token" * 20_000, "@" + "https://x" * 13_000])
@pytest.mark.timeout(120)
def test_a_long_word_is_searched_for_secrets_at_once(word: str) -> None:
    assert redact(word) == word
    assert "hunter2" not in redact(f"{word[:5_000]} s3://me:hunter2@bucket")


def test_messages_are_one_line_of_a_length_that_can_be_read(terminal: Terminal) -> None:
    for word in ("x" * 120_000, "x/" * 50_000, "word " * 20_000, "line\nline"):
        message = terminal.refused("spaces", "show", "attention_only", "--encoder", word)
        assert len(message) < LONGEST_LINE + 50
        assert message.endswith(("hub id owner/name\n", "give a local folder\n"))
    assert printable("a\u2028b\u2029c") == r"a\u2028b\u2029c"


def test_words_that_are_not_utf_8(terminal: Terminal) -> None:
    for command in (["report", "caf\udce9"], ["spaces", "show", "\udcff"], ["embed", "a", "b", "--out", "x\udcff"]):
        assert "is not UTF-8; rename it, or give another value" in terminal.refused(*command)


@pytest.mark.parametrize("option", ["--trials", "--epochs", "--batch-size", "--workers", "--pack", "--lanes", "--seed"])
def test_counts_have_an_end(terminal: Terminal, tiny: Tiny, option: str) -> None:
    finished = terminal.run("search", "--dry-run", "--data", tiny.store_folder, option, 10**30)
    assert finished.code == 2 and "Invalid value for" in finished.err


@pytest.mark.timeout(120)
def test_a_million_trials_are_estimated_at_once(
    terminal: Terminal, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.search.estimate.MAX_DRAWN", 20)
    command = ("search", "--dry-run", "--data", tiny.store_folder, "--tflops", 1, "--json", "--trials")
    found = [json.loads(terminal.run(*command, trials).out) for trials in (20, 40, 1_000_000)]
    assert [values["drawn"] for values in found] == [20] * 3
    assert [values["trials"] for values in found] == [20, 40, 1_000_000]
    # Two trials are fixed; of the others each costs the mean.
    once, twice, many = (values["training_flops"] for values in found)
    each = (twice - once) / 20
    assert many == pytest.approx(once + each * 999_980, rel=1e-6)
    text = terminal.run(*[word for word in command if word != "--json"], 1_000_000).out
    assert "1000000 trials (costs of 20 drawn ones) of 3 epochs" in text


def test_no_more_trials_than_configurations_are_estimated(
    terminal: Terminal, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.search.estimate.MAX_DRAWN", 5)
    space = {
        "name": "mine",
        "description": "Seven configurations.",
        "fixed": {"lora.targets": ["q_proj"]},
        "dimensions": {"lora.rank": {"int": [2, 8]}},
    }
    (terminal.folder / "mine.yaml").write_text(yaml.safe_dump(space))
    command = ("search", "--dry-run", "--data", tiny.store_folder, "--tflops", 1, "--json", "--space", "mine.yaml")
    assert json.loads(terminal.run(*command, "--trials", 1_000).out)["trials"] == 7 + 2


# Stores


def without(name: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.drop_columns([name])


def with_values(name: str, value: Any, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.schema.get_field_index(name), name, pa.array([value] * len(table), kind))

    return change


DAMAGE: dict[str, tuple[str, Callable[[pa.Table], pa.Table], str]] = {
    "no split": ("clips.arrow", without("split"), "has the columns clip_id"),
    "a split as text": ("clips.arrow", with_values("split", "train", pa.string()), "split .string"),
    "an unknown split": ("clips.arrow", with_values("split", 9, pa.int8()), "a split that does not exist"),
    "no split given": ("clips.arrow", with_values("split", None, pa.int8()), "no value of split"),
    "an unknown shard": ("clips.arrow", with_values("shard", 5, pa.int32()), "a shard that does not exist"),
    "a shard before the first": ("clips.arrow", with_values("shard", -1, pa.int32()), "a shard that does not exist"),
    "an unknown batch": ("clips.arrow", with_values("batch", 99, pa.int32()), "a batch that does not exist"),
    "no frames": ("clips.arrow", with_values("frames", 0, pa.int32()), "a frames that does not exist"),
    "no captions": ("clips.arrow", with_values("captions", [], pa.list_(pa.int64())), "a clip without captions"),
    "unknown captions": ("clips.arrow", with_values("captions", [99], pa.list_(pa.int64())), "captions that does not"),
    "captions without texts": ("captions.arrow", with_values("text", None, pa.string()), "no value of text"),
    "no caption at all": ("captions.arrow", lambda table: table.slice(0, 0), "batches instead of one"),
    "a width too small": (
        "captions.arrow",
        with_values("embedding", [1.0, 0.0], pa.list_(pa.float32(), 2)),
        "embedding .fixed_size_list",
    ),
    "features as text": ("features-00000.arrow", with_values("features", "x", pa.string()), "features .string"),
}


def store_with(tiny: Tiny, folder: Path, file: str, change: Callable[[pa.Table], pa.Table]) -> Path:
    shutil.copytree(tiny.store_folder, folder)
    (folder / file).write_bytes(as_file(change(pa.ipc.open_file((folder / file).read_bytes()).read_all())))
    meta = json.loads((folder / META_FILE).read_text())
    meta["files"][file] = (folder / file).stat().st_size
    (folder / META_FILE).write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_store_that_lies_is_refused_when_it_is_opened(tiny: Tiny, tmp_path: Path, damage: str) -> None:
    file, change, said = DAMAGE[damage]
    folder = store_with(tiny, tmp_path / "store", file, change)
    with pytest.raises(DataError, match=f"damaged store .*{said}.*; delete the folder and prepare it again"):
        Store.open(folder)


def test_features_that_are_not_there(tiny: Tiny, tmp_path: Path) -> None:
    """They are read one by one, so opening does not find them."""
    store = Store.open(store_with(tiny, tmp_path / "a", "clips.arrow", with_values("slot", 10**6, pa.int32())))
    with pytest.raises(DataError, match=r"damaged store .clip 3 has 0 numbers of 16 channels"):
        store.features(3)
    odd = with_values("features", [0.5] * 17, pa.list_(pa.float32()))
    with pytest.raises(DataError, match=r"damaged store .clip 3 has 17 numbers of 16 channels"):
        Store.open(store_with(tiny, tmp_path / "b", "features-00000.arrow", odd)).features(3)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("text_dim", "8", "text_dim: "),
        ("text_dim", 0, "text_dim: "),
        ("feature_channels", None, "feature_channels: "),
        ("shards", ["../features-00000.arrow"], "shards.0: .*is not the name of a file"),
        ("fingerprint", "../../x", "fingerprint: .*is not the name of a file"),
        ("files", [], "files: "),
        ("encoder", "x", "encoder: "),
    ],
)
def test_a_store_whose_json_lies(tiny: Tiny, tmp_path: Path, field: str, value: object, said: str) -> None:
    shutil.copytree(tiny.store_folder, tmp_path / "store")
    path = tmp_path / "store" / META_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(DataError, match=f"damaged store .{said}"):
        Store.open(tmp_path / "store")


def test_only_one_process_writes_a_store_and_no_lock_is_left(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom tuner.data.writer import only_writer\n"
        "with only_writer(Path(sys.argv[1])):\n    print('in', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as first:  # type: ignore[call-overload]
        assert first.stdout.readline() == "in\n"
        assert [path.name for path in tmp_path.iterdir()] == [".store.lock"]
        with subprocess.Popen(command, text=True, **pipes) as second:  # type: ignore[call-overload]
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(1)
            first.communicate()
            assert second.communicate()[0] == "in\n"
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path / "store"):
        pass
    assert list(tmp_path.iterdir()) == []


# Recordings, manifests, adapters


@pytest.mark.parametrize("loud", [3e38, 1e20, 2e6])
def test_samples_that_no_spectrum_can_hold(loud: float) -> None:
    """Also with channels whose sum is no finite number, and without a warning of numpy's."""
    file = io.BytesIO()
    samples = np.stack([loud * np.cos(np.arange(2_000)), loud * np.cos(np.arange(2_000))], axis=1)
    soundfile.write(file, samples, 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(UnusableAudioError, match="unreadable"):
        decode(file.getvalue(), 30)


def test_a_time_of_a_zone_that_nobody_knows(tmp_path: Path) -> None:
    times = pa.array([2**40] * 2, pa.timestamp("us", "Mars/Olympus"))
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"audio": ["a.wav", "b.wav"], "caption": ["x", "y"], "clip_id": times}), path)
    with pytest.raises(DataError, match=r"m.parquet, row 1: `clip_id` .*; write this value again"):
        read_manifest(path)


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    config = TrialConfig(lora=LoraSpec(rank=2, targets=("q_proj", "v_proj")))
    return train_and_export(tiny, config, tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("text", ['{"a\\u0000b": 1}', "[" * 10_000, "[]", '{"r": ' + "9" * 5_000 + "}"])
def test_an_adapter_configuration_that_peft_only_warns_about(
    terminal: Terminal, trained: Trained, tiny: Tiny, text: str
) -> None:
    folder = terminal.folder / "adapter"
    shutil.copytree(trained.folder, folder)
    path = folder / "adapter_config.json"
    if text.startswith('{"a'):
        text = json.dumps(json.loads(path.read_text()) | json.loads(text))
    path.write_text(text)
    message = terminal.refused("evaluate", folder, "--data", tiny.store_folder)
    assert "adapter_config.json: is not a PEFT configuration (" in message


# Databases


def database(folder: Path) -> Path:
    """A study of one trial."""
    path = folder / "study.db"
    study = open_database(path, Patience(lambda text: None), "s", ["maximize"])
    attributes = {"origin": "sampled", "config": TrialConfig().model_dump_json()}
    study.add_trial(optuna.trial.create_trial(value=0.5, user_attrs=attributes))
    return path


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE trials SET state = 'x'",
        "UPDATE trial_user_attributes SET value_json = '{'",
        "UPDATE trial_user_attributes SET value_json = '\"{}x\"'",
        "DELETE FROM trial_user_attributes WHERE key = 'origin'",
        "UPDATE study_directions SET direction = 'MINIMIZE'",
        "ALTER TABLE trials DROP COLUMN datetime_start",
    ],
)
def test_a_damaged_database_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """At once: waiting does not bring a table back."""
    monkeypatch.setenv(PATIENCE_VARIABLE, "3600")
    path = database(tmp_path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(damage)
        connection.commit()
    with pytest.raises(StudyError, match=r"study.db: is damaged \(.*\); restore the file or start a new study"):
        open_database(path, Patience(lambda text: None), "s", ["maximize"])


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5_000])
def test_what_is_no_database(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.db").write_bytes(content)
    with pytest.raises(StudyError, match=r"study.db: is damaged \("):
        open_database(tmp_path / "study.db", Patience(lambda text: None), "s", ["maximize"])


@pytest.mark.parametrize("name", ["a%20b", "what?", "a#b", "a b", "100%", "ü:@", "a?x=1&y"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    """In a URL these letters mean something else."""
    folder = tmp_path / name
    folder.mkdir()
    path = database(folder)
    assert [file.name for file in folder.iterdir()] == ["study.db"]
    assert len(open_database(path, Patience(lambda text: None), "s", ["maximize"]).trials) == 1
    url = PatientStorage(path, Patience(lambda text: None)).url
    assert make_url(url).database == str(path)
    assert [item.name for item in tmp_path.iterdir()] == [name]
