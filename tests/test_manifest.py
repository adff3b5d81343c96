"""Manifests of every kind, their errors, and the splits drawn from them."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuner.data.manifest import ClipRow, read_manifest
from tuner.data.plan import file_states, make_plan, manifest_digest
from tuner.data.prepare import PrepareOptions, _Results, _splits
from tuner.data.splits import SPLITS, assign_splits, group_recordings
from tuner.data.tables import EmbeddedAudio, read_audio_bytes
from tuner.errors import ConfigError, DataError

ROWS: list[dict[str, Any]] = [
    {"audio": "a.wav", "caption": "A dog barks.", "clip_id": "a", "split": "train", "language": "en"},
    {"audio": "sub/b.wav", "caption": "Rain, falling", "clip_id": "b", "split": "val", "language": None},
    {"audio": "c.wav", "caption": "\u2028 odd \u2028 spaces", "clip_id": "c", "split": None, "language": "fr"},
]


def write_manifest(folder: Path, kind: str) -> Path:
    path = folder / f"manifest.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_all_kinds_of_file_say_the_same(tmp_path: Path, kind: str) -> None:
    rows = read_manifest(write_manifest(tmp_path, kind))
    first = 2 if kind == "csv" else 1
    assert rows == [
        ClipRow(first, tmp_path / "a.wav", ("A dog barks.",), "a", "train", "en"),
        ClipRow(first + 1, tmp_path / "sub/b.wav", ("Rain, falling",), "b", "validation", None),
        ClipRow(first + 2, tmp_path / "c.wav", ("odd \u2028 spaces",), "c", None, "fr"),
    ]


def test_captions_lists_ids_and_absolute_paths(tmp_path: Path) -> None:
    lines = [{"audio": "/data/x.wav", "captions": ["one", " ", "two", "one"]}, {"audio": "y.wav", "caption": "three"}]
    path = tmp_path / "m.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    first, second = read_manifest(path)
    assert (first.audio, first.captions, first.clip_id) == (Path("/data/x.wav"), ("one", "two"), "/data/x.wav")
    assert (second.row, second.clip_id) == (3, "y.wav")


def test_csv_rows_count_lines_and_cells_may_hold_lists(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text('audio,captions\na.wav,"two\nlines"\nb.wav,"[""x"", ""y""]"\n')
    rows = read_manifest(path)
    assert [(row.row, row.captions) for row in rows] == [(2, ("two\nlines",)), (4, ("x", "y"))]


def test_blank_values_are_kept_as_problems(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"audio": "a.wav", "caption": "  "}\n{"audio": null, "caption": "x"}\n')
    assert [row.problem for row in read_manifest(path)] == ["no caption", "no audio"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.jsonl", '{"audio": "a", "caption": "x"}\n{"audio": ', ["line 2", "JSON"]),
        ("m.jsonl", '["a"]', ["line 1", "JSON object"]),
        ("m.jsonl", "", ["no rows"]),
        ("m.jsonl", '{"audio": "a", "captoin": "x"}', ["`caption` or `captions`", "audio, captoin", "`captoin`"]),
        ("m.jsonl", '{"file_path": "a", "caption": "x"}', ["`audio`", "file_path"]),
        ("m.jsonl", '{"audio": "a", "caption": 5}', ["row 1", "`caption`", "5"]),
        ("m.jsonl", '{"audio": "a\\u0000b", "caption": "x"}', ["row 1", "NUL"]),
        ("m.jsonl", '{"audio": "a", "captions": {"x": 1}}', ["row 1", "`captions`"]),
        ("m.jsonl", '{"audio": "a", "caption": "x", "split": "trian"}', ["row 1", "'trian'", "validation"]),
        ("m.json", "[1, 2", ["line 1", "JSON"]),
        ("m.csv", "audio,caption\na.wav,x,y\n", ["line 2", "3 fields", "quote"]),
        ("m.csv", 'audio,caption\na.wav,"x\n', ["line 2", "CSV"]),
        ("m.txt", "a", ["unknown kind", ".jsonl"]),
        ("m.parquet", "not parquet", ["m.parquet", "cannot be read"]),
    ],
)
def test_broken_manifests_get_one_sentence(tmp_path: Path, name: str, text: str, words: list[str]) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError) as raised:
        read_manifest(path)
    message = str(raised.value)
    assert str(path) in message
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_missing_file_and_wrong_encoding(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_manifest(tmp_path / "none.csv")
    path = tmp_path / "latin.csv"
    path.write_bytes("audio,caption\na.wav,é\n".encode("latin-1"))
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_manifest(path)


def audio_table(items: list[tuple[bytes | None, str | None]]) -> pa.Table:
    audio_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    audio = pa.array([{"bytes": data, "path": path} for data, path in items], audio_type)
    return pa.table({"audio": audio, "caption": [f"caption {index}" for index in range(len(items))]})


def test_hub_shards_keep_their_audio_inside(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    train, test = tmp_path / "data/train-00000-of-00001.parquet", tmp_path / "data/test-00000-of-00001.parquet"
    pq.write_table(audio_table([(b"r%d" % index, "x.wav") for index in range(5)]), train, row_group_size=2)
    pq.write_table(audio_table([(None, "lies/beside.wav"), (b"inside", None)]), test)
    rows = read_manifest(tmp_path)
    assert [row.row for row in rows] == list(range(1, 8))
    assert [row.split for row in rows] == ["test"] * 2 + ["train"] * 5
    assert (rows[0].embedded, rows[0].audio) == (None, tmp_path / "lies/beside.wav")
    assert rows[1].embedded == EmbeddedAudio(test, 1)
    assert len({row.clip_id for row in rows}) == 7
    wanted = [EmbeddedAudio(train, 4), EmbeddedAudio(test, 1), EmbeddedAudio(train, 0), EmbeddedAudio(train, 1)]
    assert read_audio_bytes(wanted) == [b"r4", b"inside", b"r0", b"r1"]
    with pytest.raises(DataError, match="row 9"):
        read_audio_bytes([EmbeddedAudio(train, 9)])


def test_saved_datasets_are_read_as_arrow_streams(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    for split in ("train", "validation"):
        folder = tmp_path / split
        folder.mkdir()
        table = audio_table([(split.encode(), "x.wav"), (None, f"/data/{split}.wav")])
        with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / "state.json").write_text(json.dumps(state))
    rows = read_manifest(tmp_path)
    assert [row.split for row in rows] == ["train", "train", "validation", "validation"]
    assert rows[3].audio == Path("/data/validation.wav")
    inside = [row.embedded for row in rows if row.embedded]
    assert read_audio_bytes(inside) == [b"train", b"validation"]
    (tmp_path / "train/state.json").write_text("{}")
    with pytest.raises(DataError, match="_data_files"):
        read_manifest(tmp_path)


def test_folders_without_a_dataset_or_a_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a dataset folder"):
        read_manifest(tmp_path)
    pq.write_table(pa.table({"audio": ["a"], "label": ["x"], "speaker": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="found audio, label, speaker"):
        read_manifest(tmp_path)


def test_groups_join_through_any_shared_identity() -> None:
    groups = group_recordings([("id:a", "sound:1"), ("id:b", "sound:2"), ("id:c", "sound:1"), ("id:b", "sound:3")])
    assert groups == ["id:a", "id:b", "id:a", "id:b"]
    chain = group_recordings([("id:z", "sound:1"), ("id:y", "sound:2"), ("id:y", "sound:1")])
    assert len(set(chain)) == 1


def test_recordings_are_one_by_clip_id_or_sound_alone(tmp_path: Path) -> None:
    """Rows of one file are one clip already; all of these clips hang together, so they share the drawn split."""
    names = ["a", "a", "b", "c"]
    for position in range(4):
        (tmp_path / f"{position}.wav").write_bytes(b"")
    lines = [{"audio": f"{position}.wav", "caption": "x", "clip_id": name} for position, name in enumerate(names)]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    rows = read_manifest(manifest)
    plan, digests = make_plan(rows, file_states(rows)), ["1", "2", "2", "3"]
    results = SimpleNamespace(clips=range(4), facts=lambda clip: (1, 1.0, digests[clip]))
    for seed in range(6):
        splits = _splits(plan, cast(_Results, results), PrepareOptions(fractions=(0.5, 0.0, 0.5), seed=seed))
        assert len(set(splits[:3])) == 1
        assert splits[3] != splits[0]


def test_drawn_splits_are_exact_grouped_and_independent_of_order() -> None:
    groups = [f"g{index}" for index in range(1000)]
    drawn = assign_splits(groups, [None] * 1000, (0.7, 0.15, 0.15), seed=0)
    assert Counter(drawn) == {"train": 700, "validation": 150, "test": 150}
    assert assign_splits(groups[::-1], [None] * 1000, (0.7, 0.15, 0.15), seed=0) == drawn[::-1]
    other = assign_splits(groups, [None] * 1000, (0.7, 0.15, 0.15), seed=1)
    # Two independent draws agree on 0.7 ** 2 + 2 * 0.15 ** 2 = 53.5 % of the clips.
    assert 0.45 < sum(a == b for a, b in zip(drawn, other, strict=True)) / 1000 < 0.62
    pairs = assign_splits([f"g{index // 2}" for index in range(1000)], [None] * 1000, (0.5, 0.25, 0.25), seed=0)
    assert pairs[::2] == pairs[1::2]
    assert Counter(pairs)["train"] == 500
    # The cut after 3 of 6 clips halves the second pair: no more than half of it is beyond, so it stays whole in train.
    torn = assign_splits(["a", "a", "b", "b", "c", "c"], [None] * 6, (0.5, 0.5, 0.0), seed=0)
    assert Counter(torn) == {"train": 4, "validation": 2}


def test_given_splits_are_kept_and_take_their_group() -> None:
    given = [None, "test", None, None]
    drawn = assign_splits(["a", "a", "b", "c"], given, (1.0, 0.0, 0.0), seed=3)
    assert drawn == ["test", "test", "train", "train"]
    assert set(drawn) <= set(SPLITS)
    with pytest.raises(DataError, match=r"rows 7 and 9 .*train and test"):
        assign_splits(["a", "b", "a"], ["train", "train", "test"], (1.0, 0.0, 0.0), 0, rows=[7, 8, 9])
    for fractions in [(0.5, 0.5, 0.5), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5)]:
        with pytest.raises(ConfigError, match="sum to 1"):
            assign_splits(["a"], [None], fractions, 0)


def test_plan_merges_rows_of_one_recording_and_counts_captions_once(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"sound")
    rows = [
        ClipRow(1, tmp_path / "a.wav", ("A  Dog",), "a"),
        ClipRow(2, tmp_path / "none.wav", ("lost",), "b"),
        ClipRow(3, tmp_path / "a.wav", ("a dog", "barks"), "a2", "test"),
        ClipRow(4, tmp_path / "a.wav", (), "a", problem="no caption"),
        ClipRow(5, tmp_path, ("a folder",), "c"),
    ]
    plan = make_plan(rows, file_states(rows))
    assert plan.captions == ("A  Dog", "barks")
    (clip,) = plan.clips
    assert (clip.rows, clip.captions, clip.split, clip.identities) == ((1, 3), (0, 1), "test", ("id:a", "id:a2"))
    assert [(reject.row, reject.reason) for reject in plan.rejects] == [
        (2, "missing"),
        (4, "no caption"),
        (5, "missing"),
    ]
    conflict = [rows[2], ClipRow(5, tmp_path / "a.wav", ("x",), "a", "train")]
    with pytest.raises(DataError, match="rows 3 and 5"):
        make_plan(conflict, file_states(conflict))


def test_digest_follows_rows_and_files(tmp_path: Path) -> None:
    audio = tmp_path / "a.wav"
    audio.write_bytes(b"sound")
    rows = [ClipRow(1, audio, ("x",), "a")]
    before = manifest_digest(rows, file_states(rows))
    assert manifest_digest(rows, file_states(rows)) == before
    assert manifest_digest([ClipRow(1, audio, ("y",), "a")], file_states(rows)) != before
    audio.write_bytes(b"other sound")
    assert manifest_digest(rows, file_states(rows)) != before


# An audio root


@pytest.fixture
def rooted(tmp_path: Path) -> Path:
    """A folder of recordings, with one recording and one folder beside it."""
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    for path in (root / "fine.wav", root / "deep/fine.wav", tmp_path / "secret.wav"):
        path.write_bytes(b"sound")
    return root


def write_audio(folder: Path, *audio: str) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [json.dumps({"audio": name, "caption": "x"}) + "\n" for name in audio]
    (folder / "manifest.jsonl").write_text("".join(rows))
    return folder / "manifest.jsonl"


def test_recordings_are_found_below_the_audio_root(rooted: Path, tmp_path: Path) -> None:
    """Relative ones, absolute ones, and links that stay inside; without a root they are beside the manifest."""
    (rooted / "link.wav").symlink_to("deep/fine.wav")
    manifest = write_audio(tmp_path / "elsewhere", "fine.wav", str(rooted / "fine.wav"), "deep/../fine.wav", "link.wav")
    assert all(row.audio.is_file() for row in read_manifest(manifest, rooted))
    assert read_manifest(manifest, rooted)[0].audio == rooted / "fine.wav"
    assert read_manifest(manifest)[0].audio == tmp_path / "elsewhere/fine.wav"


@pytest.mark.parametrize(
    "audio",
    [
        "../secret.wav",
        "deep/../../secret.wav",
        "/etc/passwd",
        "link.wav",
        "there/secret.wav",
        "circle.wav",
        "~/x.wav/../../..",
    ],
)
def test_nothing_leaves_the_audio_root(rooted: Path, tmp_path: Path, audio: str) -> None:
    (rooted / "link.wav").symlink_to(tmp_path / "secret.wav")
    (rooted / "there").symlink_to(tmp_path)
    (rooted / "circle.wav").symlink_to("circle.wav")
    manifest = write_audio(tmp_path / "elsewhere", "fine.wav", audio)
    with pytest.raises(DataError, match=r"manifest\.jsonl, row 2: .* is outside the audio root .*; move the recording"):
        read_manifest(manifest, rooted)
    assert len(read_manifest(manifest)) == 2, "without a root, as it was"


def test_an_audio_root_must_be_there(rooted: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"audio_root .*nowhere: no such folder"):
        read_manifest(write_audio(tmp_path, "fine.wav"), tmp_path / "nowhere")


def test_dataset_folders_obey_the_audio_root(rooted: Path, tmp_path: Path) -> None:
    """Recordings that a table names, the tables that hold recordings, and the tables that the folder names."""
    named = pa.table({"audio": [{"bytes": None, "path": "../secret.wav"}], "caption": ["x"]})
    (rooted / "set").mkdir()
    pq.write_table(named, rooted / "set/train.parquet")
    with pytest.raises(DataError, match=r"set, row 1: .*secret\.wav is outside the audio root"):
        read_manifest(rooted / "set", rooted)
    embedded = pa.table({"audio": [{"bytes": b"sound", "path": None}], "caption": ["x"]})
    pq.write_table(embedded, tmp_path / "held.parquet")
    (rooted / "set/train.parquet").unlink()
    (rooted / "set/train.parquet").symlink_to(tmp_path / "held.parquet")
    with pytest.raises(DataError, match=r"set, row 1: .* is outside the audio root"):
        read_manifest(rooted / "set", rooted)


@pytest.mark.parametrize("name", ["../held", "/held", "..", "", ".", "a/b", 3, None])
def test_a_dataset_folder_names_only_its_own_files(tmp_path: Path, name: object) -> None:
    """With or without a root: what a downloaded folder says of itself leads nowhere else."""
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match=r"names the file .* outside its folder"):
        read_manifest(tmp_path)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(DataError, match=r"names the file .* outside its folder"):
        read_manifest(tmp_path)
