"""Manifests as other programs and data sets have them: what each says is read whole, or refused in one sentence."""

from __future__ import annotations

import json
import time
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuner.data.columns import split_word
from tuner.data.manifest import ClipRow, read_manifest
from tuner.data.plan import check_clip_ids
from tuner.data.tables import EmbeddedAudio, read_audio_bytes
from tuner.errors import DataError
from tuner.near import nearest, shown
from tuner.plain_json import parse_json

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def captions_of(rows: list[ClipRow]) -> list[tuple[str, ...]]:
    return [row.captions for row in rows]


def refused(path: Path, *words: str, audio_root: Path | None = None) -> str:
    with pytest.raises(DataError) as raised:
        read_manifest(path, audio_root)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 1000
    message.encode()
    assert all(word in message for word in words), message
    return message


# Several captions


def test_repeated_names_are_refused(tmp_path: Path) -> None:
    refused(written(tmp_path, "a.csv", "audio,caption, caption\nx.wav,one,two\n"), "several columns `caption`")
    refused(written(tmp_path, "a.tsv", "audio\tcaption\tspeaker\tspeaker\nx\ty\t1\t2\n"), "several columns `speaker`")
    # A spreadsheet leaves columns without any name at the end.
    assert captions_of(read_manifest(written(tmp_path, "b.csv", "audio,caption,,\nx.wav,one,,\n"))) == [("one",)]
    for name in ("a.jsonl", "a.json"):
        text = '{"audio": "x.wav", "caption": "one", "caption": "two"}'
        text = f"[{text}]" if name == "a.json" else text
        refused(written(tmp_path, name, text), "line 1", "the key 'caption' is written twice")
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["1"]), pa.array(["2"])], ["audio", "caption", "caption"])
    pq.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "several columns `caption`")
    unread = pa.Table.from_arrays([pa.array(["x"]), pa.array(["1"]), pa.array(["2"]), pa.array(["3"])], list("abcc"))
    pq.write_table(unread.rename_columns(["audio", "caption", "n", "n"]), tmp_path / "b.parquet")
    assert captions_of(read_manifest(tmp_path / "b.parquet")) == [("1",)]


def test_numbered_columns_and_lists_are_several_captions(tmp_path: Path) -> None:
    header = "file_name,caption_1,caption_2,caption_3,caption_10,caption_5\n"
    clotho = written(tmp_path, "clotho.csv", header + "a b.wav,one,two,three,ten,five\nc.wav,x,,x,,\n")
    rows = read_manifest(clotho)
    assert captions_of(rows) == [("one", "two", "three", "five", "ten"), ("x",)]
    assert rows[0].audio == tmp_path / "a b.wav"
    lines = [
        {"audio": "a.wav", "caption": ["one", "two"]},
        {"audio": "b.wav", "caption": "one", "captions": ["two"], "caption_1": "three", "caption2": "four"},
        {"audio": "c.wav", "caption": "[laughter] and [music"},
        {"audio": "d.wav", "caption": '["one", "two"]'},
        {"audio": "e.wav", "caption": "[1, 2]"},
    ]
    path = written(tmp_path, "m.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert captions_of(read_manifest(path)) == [
        ("one", "two"), ("one", "two", "three", "four"), ("[laughter] and [music",), ("one", "two"), ("[1, 2]",),
    ]  # fmt: skip


# Separators, names of columns, places of files


@pytest.mark.parametrize(("name", "separator"), [("a.tsv", "\t"), ("a.csv", "\t"), ("a.csv", ";"), ("a.tsv", ",")])
def test_the_header_says_what_separates(tmp_path: Path, name: str, separator: str) -> None:
    rows = [["audio", "caption", "split"], ["x.wav", "one, two", "dev"], ["y.wav", "a; b", "test"]]
    if separator != "\t":
        rows = [[cell if cell.isidentifier() else f'"{cell}"' for cell in row] for row in rows]
    text = "\ufeff" + "".join(separator.join(row) + "\r\n" for row in rows)
    found = read_manifest(written(tmp_path, name, text))
    assert [(row.captions, row.split) for row in found] == [(("one, two",), "validation"), (("a; b",), "test")]
    assert "a semicolon" in refused(written(tmp_path, "b.csv", "audio;caption\nx;y;z\n"), "3 fields")


def test_audio_folders_of_datasets(tmp_path: Path) -> None:
    """The metadata are beside the recordings; what `datasets` takes as split is the folder."""
    written(tmp_path, "one/metadata.csv", "file_name,transcription\na.wav,one\nsub/b.wav,two\n")
    rows = read_manifest(tmp_path / "one")
    assert [(row.audio, row.captions, row.split) for row in rows] == [
        (tmp_path / "one/a.wav", ("one",), None),
        (tmp_path / "one/sub/b.wav", ("two",), None),
    ]
    written(tmp_path, "two/train/metadata.jsonl", '{"file_name": "a.wav", "transcription": "one"}\n')
    written(tmp_path, "two/Test/metadata.jsonl", '{"file_name": "a.wav", "transcription": "two"}\n')
    rows = read_manifest(tmp_path / "two")
    assert [(row.audio, row.split) for row in rows] == [
        (tmp_path / "two/Test/a.wav", "test"),
        (tmp_path / "two/train/a.wav", "train"),
    ]
    assert rows[0].clip_id != rows[1].clip_id
    text = "file_name,transcription\ntrain/a.wav,one\nvalidation\\b.wav,two\n"
    written(tmp_path, "three/metadata.csv", text)
    assert [row.split for row in read_manifest(tmp_path / "three")] == ["train", "validation"]
    written(tmp_path, "three/metadata.csv", text + "c.wav,three\n")
    refused(tmp_path / "three", "train/a.wav", "c.wav", "of none")


def test_wavcaps_as_published(tmp_path: Path) -> None:
    data = [
        {"id": "180913", "caption": "rain", "duration": 1.0, "download_link": "https://x", "audio": "wav_path"},
        {"id": "Yb0RFKhbpFJA.wav", "caption": "a dog", "duration": 10.0, "audio": "wav_path"},
        {"id": "lost", "caption": "a bell", "duration": 10.0, "audio": "wav_path"},
    ]
    path = written(tmp_path, "fsd_final.json", json.dumps({"num_captions_per_audio": 1, "data": data}, indent=2))
    for name in ("180913.flac", "Yb0RFKhbpFJA.flac", "other.flac"):
        written(tmp_path, f"audio/{name}", b"sound")
    rows = read_manifest(path, tmp_path / "audio")
    assert [(row.audio.name, row.clip_id, row.captions) for row in rows] == [
        ("180913.flac", "180913", ("rain",)),
        ("Yb0RFKhbpFJA.flac", "Yb0RFKhbpFJA", ("a dog",)),
        ("lost.wav", "lost", ("a bell",)),
    ]
    given = [{"audio": "a.flac", "caption_1": "one", "caption_2": "two", "duration": 3}]
    path = written(tmp_path, "train.json", json.dumps({"data": given, "num_captions_per_audio": 2}))
    assert captions_of(read_manifest(path)) == [("one", "two")]


@pytest.mark.parametrize("form", ["{video}", "Y{video}", "{video}_{start}", "{number}"])
def test_audiocaps_as_published(tmp_path: Path, form: str) -> None:
    header = "audiocap_id,youtube_id,start_time,caption\n"
    text = header + "103549,7fmOlUlwoNg,20,Constant rattling\n103541,6BJ455B1aAs,0,A rocket flies\n1,zzz,3,gone\n"
    path = written(tmp_path, "test.csv", text)
    refused(path, "no recording named by one", "7fmOlUlwoNg.wav", "audio_root")
    for number, video, start in (("103549", "7fmOlUlwoNg", 20), ("103541", "6BJ455B1aAs", 0)):
        written(tmp_path, form.format(number=number, video=video, start=start) + ".wav", b"sound")
    rows = read_manifest(path)
    assert [row.audio.is_file() for row in rows] == [True, True, False]
    assert [row.clip_id for row in rows] == ["7fmOlUlwoNg", "6BJ455B1aAs", "zzz"]


def test_ids_alone_name_no_recordings(tmp_path: Path) -> None:
    refused(written(tmp_path, "a.jsonl", '{"id": 3, "caption": "x", "audio_path": "a.wav"}'), "`audio_path`", "renamed")


def test_paths_of_other_systems(tmp_path: Path) -> None:
    composed, apart = unicodedata.normalize("NFC", "Ré/é.wav"), unicodedata.normalize("NFD", "Ré/é.wav")
    written(tmp_path, "sub/b c.wav", b"sound")
    written(tmp_path, apart, b"sound")
    mixed = unicodedata.normalize("NFC", "Zé") + "/" + unicodedata.normalize("NFD", "é.wav")
    written(tmp_path, mixed, b"sound")
    written(tmp_path, "odd\\name.wav", b"sound")
    names = {
        "sub\\b c.wav": "sub/b c.wav",
        (tmp_path / "sub/b c.wav").as_uri(): "sub/b c.wav",
        f"file://localhost{tmp_path}/sub/b%20c.wav": "sub/b c.wav",
        composed: apart,
        apart: apart,
        composed.replace("/", "\\"): apart,
        unicodedata.normalize("NFC", mixed): mixed,
        "odd\\name.wav": "odd\\name.wav",
        "none\\x.wav": "none\\x.wav",
    }
    lines = "".join(json.dumps({"audio": name, "caption": "x"}) + "\n" for name in names)
    rows = read_manifest(written(tmp_path, "m.jsonl", lines))
    assert [row.audio for row in rows] == [tmp_path / name for name in names.values()]
    assert [row.clip_id for row in rows] == list(names)
    path = written(tmp_path, "sub/m.jsonl", json.dumps({"audio": "..\\odd\\name.wav", "caption": "x"}))
    assert len(read_manifest(path)) == 1
    out = written(tmp_path, "out.jsonl", json.dumps({"audio": (tmp_path / "m.jsonl").as_uri(), "caption": "x"}))
    refused(out, "row 1", "outside the audio root", audio_root=tmp_path / "sub")


def test_optional_columns_hold_anything(tmp_path: Path) -> None:
    languages: list[Any] = [1, float("nan"), ["en"], True, "\ud800", "a\0", " en "]
    lines = [{"audio": "a.wav", "caption": "x", "language": value, "split": float("nan")} for value in languages]
    path = written(tmp_path, "m.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert [row.language for row in read_manifest(path)] == [*[None] * 6, "en"]
    values = {"clip_id": [7, None], "language": [1.5, None], "caption": ["x", "y"], "audio": ["a.wav", "b.wav"]}
    pq.write_table(pa.table(values), tmp_path / "m.parquet")
    rows = read_manifest(tmp_path / "m.parquet")
    assert [(row.clip_id, row.language) for row in rows] == [("7", None), ("b.wav", None)]
    for value in ({"a": 1}, [1]):
        line = json.dumps({"audio": "a.wav", "caption": "x", "clip_id": value})
        refused(written(tmp_path, "n.jsonl", line), "row 1", "`clip_id` must be text or a number")


# What Python or Arrow cannot hold


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[" * 10_000 + "]" * 10_000, "nested too deeply"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, "nested too deeply"),
        ("9" * 5_000, "more than 4300 digits"),
        ('"\\ud83d"', "half a character"),
        ("[" * 900 + "]" * 900, "must be"),
    ],
)
@pytest.mark.parametrize("name", ["m.jsonl", "m.json"])
def test_json_that_python_cannot_hold(tmp_path: Path, name: str, value: str, words: str) -> None:
    for field in ("caption", "clip_id", "audio"):
        row = {"audio": '"a.wav"', "caption": '"x"'} | {field: value}
        text = "{" + ", ".join(f'"{key}": {content}' for key, content in row.items()) + "}"
        refused(written(tmp_path, name, f"[{text}]" if name == "m.json" else text), words)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 10_000)


def test_tables_with_text_that_is_none(tmp_path: Path) -> None:
    """Invalid UTF-8 as Arrow takes it from a careless writer: nobody checks it on the way."""
    broken = pa.array([b"fine", b"\xff\xfe broken"], pa.binary()).view(pa.string())
    fine = pa.array(["a.wav", "b.wav"])
    pq.write_table(pa.table({"audio": fine, "caption": broken}), tmp_path / "m.parquet")
    refused(tmp_path / "m.parquet", "row 2", "`caption` is not UTF-8")
    pq.write_table(pa.table({"audio": fine, "caption": fine, "notes": broken}), tmp_path / "n.parquet")
    assert len(read_manifest(tmp_path / "n.parquet")) == 2
    far = pa.array([2**62, 1], pa.timestamp("us"))
    pq.write_table(pa.table({"audio": fine, "caption": fine, "clip_id": far}), tmp_path / "o.parquet")
    refused(tmp_path / "o.parquet", "row 1", "`clip_id`")


def test_long_words_are_compared_with_nothing(tmp_path: Path) -> None:
    """difflib would take minutes for a megabyte."""
    start, long = time.monotonic(), "captain " * 130_000
    line = {"audio": "a.wav", "caption": "x", "split": long}
    refused(written(tmp_path, "a.jsonl", json.dumps(line)), "row 1", "unknown split")
    refused(written(tmp_path, "b.jsonl", json.dumps({"audio": "a.wav", long: "x"})), "`caption` or `captions`")
    assert nearest(long, ["caption"]) is None and nearest("captoin", [long, "caption"]) == "caption"
    assert len(shown(long)) < 70 and shown([1]) == "[1]"
    assert time.monotonic() - start < 10


def test_long_names_and_pointers(tmp_path: Path) -> None:
    lines = (
        json.dumps({"audio": "é" * 200 + ".wav", "caption": "x"}) + "\n" + json.dumps({"audio": "a", "caption": "x"})
    )
    assert not read_manifest(written(tmp_path, "m.jsonl", lines))[0].audio.name.startswith("/")
    refused(tmp_path / ("n" * 300 + ".csv"), "no such file")
    refused(tmp_path / "half\udcff.csv", "half a character")
    for name in ("a.csv", "a.jsonl", "a.parquet", "set/train-0.parquet"):
        path = written(tmp_path, name, LFS)
        refused(path.parent if "/" in name else path, "Git LFS pointer", "git lfs pull")


# Clip ids


def test_clip_ids_that_begin_again_in_each_split_are_found_in_the_manifest(tmp_path: Path) -> None:
    lines = [
        {"audio": f"{n}.wav", "caption": "x", "clip_id": n % 3, "split": ("train", "dev")[n // 3]} for n in range(6)
    ]
    rows = read_manifest(written(tmp_path, "m.jsonl", "".join(json.dumps(line) + "\n" for line in lines)))
    with pytest.raises(DataError, match=r"rows 1 and 4 have the clip_id 0 and two splits \(train and validation\)"):
        check_clip_ids(rows)
    check_clip_ids(rows[:4][1:])
    # Rows of one recording may share their id within a split, and ids without a split are drawn together.
    check_clip_ids([ClipRow(1, tmp_path, ("x",), "a"), ClipRow(2, tmp_path, ("x",), "a", "test")])


# Folders of datasets


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("train", "train"), ("train.clean.100-00000-of-00001", "train"), ("Train-0", "train"), ("train_0", "train"),
        ("TRAINING2", "training"), ("development-0", "development"), ("dev-other", "dev"), ("partial-train", "train"),
        ("clotho_val_01", "val"), ("valid", "valid"), ("eval.2", "eval"), ("test-train", "test"), ("trainval", None),
        ("a-train-b-test", None), ("0000", None), ("data", None), ("", None), ("contest", None),
    ],
)  # fmt: skip
def test_names_of_splits(name: str, word: str | None) -> None:
    assert split_word(name) == word


def shards(folder: Path, *names: str, **columns: Any) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        table = {"audio": [f"{name}.wav"], "caption": ["x"]} | columns
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    return folder


def test_shards_keep_the_split_of_their_name(tmp_path: Path) -> None:
    names = ("clean/train.100-0", "clean/Validation-0", "clean/test-0", "other/train_500", "default/partial-test/0000")
    rows = read_manifest(shards(tmp_path / "a", *names))
    found = {row.clip_id.removesuffix(".wav"): row.split for row in rows}
    assert found == dict(zip(names, ("train", "validation", "test", "train", "test"), strict=True))
    assert {row.split for row in read_manifest(shards(tmp_path / "b", "0000", "more/0001"))} == {None}
    refused(shards(tmp_path / "c", "train-0", "extra-0"), "train-0.parquet", "extra-0.parquet", "of none")
    shards(tmp_path / "d", "train-0")
    mixed = read_manifest(shards(tmp_path / "d", "extra-0", split=["test"]))
    assert [row.split for row in mixed] == ["test", "train"]
    refused(shards(tmp_path / "e", "development-0", "validation-0", "evaluation-0"), "`development`", "`validation`")
    assert {row.split for row in read_manifest(shards(tmp_path / "f", "development-0", "train-0"))} == {
        "train", "validation",
    }  # fmt: skip


def save_to_disk(folder: Path, splits: dict[str, int], **options: Any) -> None:
    """As `DatasetDict.save_to_disk` leaves it, with the audio inside."""
    for split, count in splits.items():
        (folder / split).mkdir(parents=True)
        audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        held = [{"bytes": f"{folder.name} {split} {index}".encode(), "path": "x.wav"} for index in range(count)]
        table = pa.table({"audio": pa.array(held, audio), "caption": [f"{split} {index}" for index in range(count)]})
        with pa.ipc.new_stream(str(folder / split / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / split / "state.json").write_text(json.dumps(state))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


def test_embedded_rows_of_all_splits_and_configurations_are_apart(tmp_path: Path) -> None:
    for configuration in ("clean", "other"):
        save_to_disk(tmp_path / "set" / configuration, {"train.100": 2, "validation": 1, "test": 1})
    rows = read_manifest(tmp_path / "set")
    assert len({row.clip_id for row in rows}) == len(rows) == 8
    assert rows[0].clip_id == "clean/train.100/data-00000-of-00001.arrow#0"
    assert [row.split for row in rows[:4]] == ["train", "train", "validation", "test"]
    check_clip_ids(rows)
    inside = [row.embedded for row in rows if row.embedded]
    assert read_audio_bytes(inside)[5] == b"other train.100 1"
    assert len(read_manifest(tmp_path / "set/clean")) == 4
    # Folders of single splits, without the file that says so.
    (tmp_path / "set/clean/dataset_dict.json").unlink()
    assert [row.split for row in read_manifest(tmp_path / "set/clean")] == ["test", "train", "train", "validation"]
    save_to_disk(tmp_path / "total", {"total": 1})
    refused(tmp_path / "total", "unknown split 'total'")


def test_relative_folders_are_read_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_to_disk(tmp_path / "set", {"train": 1})
    monkeypatch.chdir(tmp_path)
    (row,) = read_manifest(Path("set"))
    monkeypatch.chdir("/")
    assert row.embedded is not None and read_audio_bytes([row.embedded]) == [b"set train 0"]


TEXTS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "large_dictionary": pa.dictionary(pa.int8(), pa.large_string()),
}
BYTES = {"binary": pa.binary(), "large_binary": pa.large_binary(), "binary_view": pa.binary_view()}
LISTS: dict[str, Any] = {
    "list": pa.list_, "large_list": pa.large_list, "list_view": pa.list_view, "fixed": lambda of: pa.list_(of, 2),
}  # fmt: skip


def texts(values: list[str | None], kind: str) -> Any:
    return pa.array(values).cast(TEXTS[kind]) if kind.endswith("dictionary") else pa.array(values, TEXTS[kind])


def written_as(folder: Path, kind: str, table: pa.Table) -> Path:
    folder.mkdir()
    if kind == "parquet":
        # pyarrow does not cut views into row groups.
        rows = None if "view" in str(table.schema) else 2
        pq.write_table(table, folder / "train-0.parquet", row_group_size=rows)
    else:
        with pa.ipc.new_stream(str(folder / "data.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("text", TEXTS)
def test_all_types_of_text(tmp_path: Path, kind: str, text: str) -> None:
    """As pandas (large), polars (views) and `datasets` (dictionaries of ClassLabels cast to text) write them."""
    names = ["a.wav", "b.wav", None]
    for list_name, list_of in LISTS.items():
        captions: list[Any] = [["one", "two"], ["three", "four"], ["five", "six"]]
        if kind == "parquet" and list_name == "list_view":
            continue  # pyarrow does not write it
        inner = pa.string() if text.endswith("dictionary") else TEXTS[text]
        columns = {
            "audio": texts(names, text),
            "captions": pa.array(captions, list_of(inner)),
            "split": texts(["train"] * 3, text),
            "language": pa.array(["en", None, "fr"], pa.string()),
        }
        table = pa.table(columns)
        rows = read_manifest(written_as(tmp_path / list_name, kind, table))
        assert captions_of(rows) == [tuple(pair) for pair in captions]
        assert [row.audio.name for row in rows[:2]] == ["a.wav", "b.wav"]
        assert [(row.problem, row.split, row.language) for row in rows] == [
            (None, "train", "en"), (None, "train", None), ("no audio", "train", "fr"),
        ]  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("content", BYTES)
@pytest.mark.parametrize("text", ["string", "large_string", "string_view"])
def test_all_types_of_embedded_audio(tmp_path: Path, kind: str, content: str, text: str) -> None:
    held = [
        {"bytes": b"one", "path": "x"},
        {"bytes": None, "path": "beside.wav"},
        None,
        {"bytes": b"four", "path": None},
    ]
    struct = pa.struct([("bytes", BYTES[content]), ("path", TEXTS[text])])
    captions = pa.array(list("abcd"), TEXTS[text])
    table = pa.table({"audio": pa.array(held, struct), "caption": captions})
    rows = read_manifest(written_as(tmp_path / "set", kind, table))
    assert [row.problem for row in rows] == [None, None, "no audio", None]
    assert rows[1].audio == tmp_path / "set/beside.wav"
    inside = [rows[3].embedded, rows[0].embedded]
    assert read_audio_bytes([item for item in inside if item]) == [b"four", b"one"]
    plain = pa.table({"audio": pa.array([b"one", None, b"three"], BYTES[content]), "caption": ["a", "b", "c"]})
    rows = read_manifest(written_as(tmp_path / "plain", kind, plain))
    assert [row.problem for row in rows] == [None, "no audio", None]
    assert isinstance(rows[2].embedded, EmbeddedAudio)
    assert read_audio_bytes([rows[2].embedded]) == [b"three"]


def test_tables_of_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({
        "audio": [{"bytes": b"one", "path": "a.wav"}, {"bytes": b"two", "path": "b.wav"}],
        "caption": pandas.Series(["x", "y"], dtype="category"),
        "captions": [["one", "two"], None],
        "language": [1.0, None],
        "clip_id": [1, 2],
    })  # fmt: skip
    frame.to_parquet(tmp_path / "m.parquet")
    rows = read_manifest(tmp_path / "m.parquet")
    assert captions_of(rows) == [("x", "one", "two"), ("y",)]
    assert [(row.clip_id, row.language) for row in rows] == [("1", None), ("2", None)]
    assert read_audio_bytes([row.embedded for row in rows if row.embedded]) == [b"one", b"two"]
    frame = pandas.DataFrame({"audio": ["a.wav", "b.wav"], "caption": ["x", None], "split": [None, "train"]})
    for name, write in {"m.csv": frame.to_csv, "m.jsonl": frame.to_json}.items():
        options = {"orient": "records", "lines": True} if name == "m.jsonl" else {}
        write(tmp_path / name, **options)
        rows = read_manifest(tmp_path / name)
        assert [(row.problem, row.split) for row in rows] == [(None, None), ("no caption", "train")]
