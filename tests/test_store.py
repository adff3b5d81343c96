"""The store's files: written in any order, read in clip order without copies, refused when damaged."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tuner.data import writer as writer_module
from tuner.data.store import CAPTIONS_FILE, META_FILE, Store
from tuner.data.store_tables import CLIP_SCHEMA
from tuner.data.writer import (
    FeatureWriter,
    check_replaceable,
    disk_faults,
    new_folder,
    write_captions,
    write_clips,
    write_meta,
)
from tuner.errors import DataError

CHANNELS = 4


def clip_features(clip: int) -> np.ndarray:
    return np.random.default_rng(clip).standard_normal((CHANNELS, 3 + clip % 5)).astype(np.float32)


def make_store(folder: Path, clips: int = 23, shard_bytes: int = 1000) -> Path:
    """A store of random features, its batches written in random order over several shards."""
    folder.mkdir()
    order = np.random.default_rng(0).permutation(clips)
    with FeatureWriter(folder, shard_bytes) as writer:
        for batch in np.array_split(order, 7):
            values: Any = pa.array([clip_features(clip).reshape(-1) for clip in batch], pa.list_(pa.float32()))
            writer.add(batch.tolist(), values)
    places = writer.places(range(clips))
    columns: dict[str, Any] = {
        "clip_id": [f"clip-{clip}" for clip in range(clips)],
        "audio": [f"{clip}.wav" for clip in range(clips)],
        "language": [None if clip % 2 else "fr" for clip in range(clips)],
        "split": [clip % 2 for clip in range(clips)],
        "frames": [2 + clip % 5 for clip in range(clips)],
        "seconds": [clip / 4 for clip in range(clips)],
        "captions": [[clip % 3, 2][: 1 + clip % 2] for clip in range(clips)],
        "shard": places[:, 0],
        "batch": places[:, 1],
        "slot": places[:, 2],
    }
    write_clips(folder, columns)
    write_captions(folder, ["a", "b", "c"], np.arange(6, dtype=np.float32).reshape(3, 2))
    meta = {"fingerprint": "f", "encoder": {"source": "x"}, "encoder_fingerprint": "e", "text_encoder": "t"}
    more = {"text_fingerprint": "tf", "text_dim": 2, "feature_channels": CHANNELS, "shards": writer.shards}
    write_meta(folder, meta | more)
    return folder


def test_clips_come_back_in_order_from_several_shards(tmp_path: Path) -> None:
    store = Store.open(make_store(tmp_path / "store"))
    assert len(store) == 23
    assert len(store.meta["shards"]) > 1
    for clip in range(23):
        np.testing.assert_array_equal(store.features(clip), clip_features(clip))
        assert store.clip_captions(clip).tolist() == [clip % 3, 2][: 1 + clip % 2]
    assert store.frames.dtype == np.int32
    assert store.frames.tolist() == [2 + clip % 5 for clip in range(23)]
    assert store.seconds.tolist() == [clip / 4 for clip in range(23)]
    assert (store.clip_ids[7], store.audio[7], store.languages[6:8]) == ("clip-7", "7.wav", ["fr", None])
    assert store.captions == ["a", "b", "c"]
    np.testing.assert_array_equal(store.text_embeddings, [[0, 1], [2, 3], [4, 5]])
    assert store.encoder.source == "x"
    for wrong in (-1, 23):
        with pytest.raises(IndexError):
            store.features(wrong)


def test_features_are_read_only_views_of_the_mapped_file(tmp_path: Path) -> None:
    store = Store.open(make_store(tmp_path / "store"))
    before = pa.total_allocated_bytes()
    views = [store.features(clip) for clip in range(len(store))]
    assert pa.total_allocated_bytes() == before
    assert all(not view.flags.owndata and not view.flags.writeable for view in views)
    assert not store.text_embeddings.flags.writeable
    # The same pages, not equal copies.
    assert store.features(3).__array_interface__["data"] == views[3].__array_interface__["data"]


def test_pickled_store_opens_the_same_folder(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "store", clips=2000)
    data = pickle.dumps(Store.open(folder))
    assert len(data) < 500
    np.testing.assert_array_equal(pickle.loads(data).features(1999), clip_features(1999))


def test_splits_are_in_order_and_never_empty(tmp_path: Path) -> None:
    store = Store.open(make_store(tmp_path / "store"))
    assert store.split("train").tolist() == list(range(0, 23, 2))
    assert store.split("validation").dtype == np.int64
    with pytest.raises(DataError, match="test split is empty"):
        store.split("test")
    with pytest.raises(DataError, match="no split 'dev'; there are train, validation, test"):
        store.split("dev")


def damage_truncate(folder: Path) -> None:
    path = folder / CAPTIONS_FILE
    path.write_bytes(path.read_bytes()[:-1])


def damage_content(folder: Path) -> None:
    path = folder / "clips.arrow"
    path.write_bytes(bytes(path.stat().st_size))


def damage_meta(folder: Path) -> None:
    meta = json.loads((folder / META_FILE).read_text())
    del meta["text_dim"]
    (folder / META_FILE).write_text(json.dumps(meta))


def age(folder: Path) -> None:
    meta = json.loads((folder / META_FILE).read_text())
    (folder / META_FILE).write_text(json.dumps(meta | {"version": 0}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / META_FILE).unlink(), "not a complete store"),
        (lambda folder: (folder / META_FILE).write_text("{"), "not a complete store"),
        (lambda folder: (folder / META_FILE).write_text("{}"), "not a complete store"),
        (lambda folder: (folder / "features-00001.arrow").unlink(), r"features-00001.arrow: is missing"),
        (damage_truncate, r"bytes instead of \d+; the store is damaged"),
        (damage_content, "damaged store"),
        (damage_meta, r"damaged store \(text_dim: missing\)"),
        (age, "store version 0"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, words: str) -> None:
    folder = make_store(tmp_path / "store")
    damage(folder)
    with pytest.raises(DataError, match=words) as raised:
        Store.open(folder)
    assert str(folder) in str(raised.value)


def test_open_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tuner prepare"):
        Store.open(tmp_path / "none")


def test_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "store"
    (tmp_path / ".store.partial").mkdir()
    (tmp_path / ".store.partial/left by a killed run").touch()
    with new_folder(target) as folder:
        (folder / "new").touch()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["new"]
    with pytest.raises(KeyboardInterrupt), new_folder(target) as folder:
        (folder / "newer").touch()
        raise KeyboardInterrupt
    assert [path.name for path in target.iterdir()] == ["new"]
    with new_folder(target) as folder:
        (folder / "newer").touch()
    assert [path.name for path in target.iterdir()] == ["newer"]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_only_stores_and_empty_folders_are_replaced(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "none")
    check_replaceable(make_store(tmp_path / "store"))
    (tmp_path / "empty").mkdir()
    check_replaceable(tmp_path / "empty")
    (tmp_path / "file").touch()
    for occupied in (tmp_path, tmp_path / "file"):
        with pytest.raises(DataError, match="exists and is not a store"):
            check_replaceable(occupied)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "CLIPS_FILE", "full")
    (tmp_path / "full").symlink_to("/dev/full")
    columns: dict[str, Any] = {field.name: [] for field in CLIP_SCHEMA}
    with pytest.raises(DataError, match=r"the disk is full; free space") as raised, disk_faults(tmp_path):
        write_clips(tmp_path, columns)
    assert str(tmp_path) in str(raised.value)
    with pytest.raises(OSError, match="other"), disk_faults(tmp_path):
        raise OSError(5, "other")


def test_reading_a_store_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "store")
    code = (
        "import sys; from pathlib import Path; from tuner.data.store import Store; "
        "Store.open(Path(sys.argv[1])).features(0); print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
