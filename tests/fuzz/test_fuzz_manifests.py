"""Manifests of every kind of file, prepared with a worker in this process in place of Ray Data."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Tiny
from fuzzing import Bench, Files
from generators import changed, maybe_torn, to_json, words
from hypothesis import strategies as st
from in_process import RECORDINGS, prepare_words

SPLITS = ("train", "train", "validation", "test", "train", "test")
ROWS: list[dict[str, Any]] = [
    {
        "audio": f"{index}.wav",
        "caption": f"A tone {index}",
        "clip_id": f"clip-{index}",
        "split": split,
        "language": "en",
    }
    for index, split in enumerate(SPLITS)
]


@pytest.fixture
def prepare(bench: Bench, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[object, ...]:
    """The words of the command in front of the manifest."""
    return (*prepare_words(tiny.encoder.source, tmp_path, monkeypatch), "--max-rejects", 0.9)


# Text


def as_lines(rows: list[Any]) -> bytes:
    return b"\n".join(to_json(row) for row in rows)


def as_list(rows: list[Any]) -> bytes:
    return to_json(rows)


def as_table(separator: str) -> Callable[[list[Any]], bytes]:
    """Cells as they come: what is no text is written as JSON, and nothing is quoted that has no separator in it."""

    def write(rows: list[Any]) -> bytes:
        rows = [row for row in rows if isinstance(row, dict)]
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = [separator.join(names)]
        for row in rows:
            cells = [row.get(name, "") for name in names]
            texts = [cell if isinstance(cell, str) else json.dumps(cell) for cell in cells]
            lines.append(separator.join(texts))
        return "\n".join(lines).encode("utf-8", "surrogatepass")

    return write


TEXTS: dict[str, Callable[[list[Any]], bytes]] = {
    "rows.jsonl": as_lines,
    "rows.json": as_list,
    "rows.csv": as_table(","),
    "rows.tsv": as_table("\t"),
    "rows.ndjson": as_lines,
}


def test_text_manifests(bench: Bench, prepare: tuple[object, ...]) -> None:
    for name, write in TEXTS.items():
        bench.lay({**RECORDINGS, name: write(ROWS)})
        bench.sound(*prepare, name)

    @bench.inputs(st.sampled_from(list(TEXTS)).flatmap(_text_case), suite=40)
    def one(case: tuple[str, bytes]) -> None:
        bench.lay({**RECORDINGS, case[0]: case[1]})
        bench.run(*prepare, case[0])


def _text_case(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
    # The value as a whole may become something else than a list.
    rows = changed(ROWS).map(lambda value: value if isinstance(value, list) else [value])
    return st.tuples(st.just(name), rows.map(TEXTS[name]).flatmap(lambda text: maybe_torn(text, 4)))


# Columns


def raw_text(*texts: bytes) -> pa.Array[Any]:
    """A column of text that holds these bytes, valid or not."""
    return pa.array(list(texts), pa.binary()).view(pa.string())


def _column(name: str) -> st.SearchStrategy[Any]:
    """A column in place of a sound one: six values of one of Arrow's types."""
    sound: list[Any] = [row[name] for row in ROWS]
    whole = st.lists(st.integers(-(2**63), 2**63 - 1) | st.none(), min_size=6, max_size=6)
    encoded = [text.encode() for text in sound]
    columns: list[Any] = [
        pa.array(sound),
        pa.array(sound, pa.large_string()),
        pa.array(sound, pa.string_view()),
        pa.array(sound).dictionary_encode(),
        pa.array(encoded),
        pa.array(encoded, pa.large_binary()),
        pa.nulls(6),
        pa.array([[text] for text in sound]),
        pa.array([[text, None, ""] for text in sound], pa.large_list(pa.string())),
        pa.array([{"path": text, "bytes": RECORDINGS["0.wav"]} for text in sound]),
        pa.array([{"bytes": None, "path": text} for text in sound]),
        pa.array([{"bytes": b"", "path": None}, None] * 3, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.array([{"array": [0.0, 1.0], "sampling_rate": 16_000}] * 6),
        pa.array([True, False, None] * 2),
        pa.array([1.5, float("nan"), float("inf"), None, 1e308, -0.0]),
        pa.array([None] * 6, pa.decimal128(38, 5)),
        raw_text(*encoded[:3], b"\xff\xfe", b"a\x00b", b"\xed\xa0\x80"),
        pa.DictionaryArray.from_arrays(pa.array([0, 1, 1, 0, None, 0]), raw_text(b"a", b"\xff")),
        pa.array([[("a", 1)]] * 6, pa.map_(pa.string(), pa.int64())),
    ]
    times: list[Any] = [
        pa.timestamp("s"),
        pa.timestamp("us", "UTC"),
        pa.timestamp("us", "Mars/Olympus"),
        pa.duration("us"),
    ]
    times += [pa.date64(), pa.time64("ns"), pa.int64()]
    typed = st.tuples(whole, st.sampled_from(times)).map(lambda pair: pa.array(pair[0], pa.int64()).view(pair[1]))
    texts = st.lists(st.none() | words().filter(_encodable), min_size=6, max_size=6).map(
        lambda cells: pa.array(cells, pa.string())
    )
    return st.sampled_from(columns) | typed | texts


def _encodable(text: str) -> bool:
    return not any("\ud800" <= sign <= "\udfff" for sign in text)


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """Six rows, some of their columns of another type, dropped, renamed or doubled."""
    columns: list[tuple[str, Any]] = [(name, pa.array([row[name] for row in ROWS])) for name in ROWS[0]]
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(columns) - 1))
        name = columns[place][0]
        match draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename", "double"])):
            case "replace":
                columns[place] = (name, draw(_column(name if name in ROWS[0] else "caption")))
            case "drop" if len(columns) > 1:
                del columns[place]
            case "rename":
                columns[place] = (
                    draw(st.sampled_from(["captions", "file_name", "id", "x"]) | words().filter(_encodable)),
                    columns[place][1],
                )
            case _:
                columns.append(columns[place])
    table = pa.Table.from_arrays([column for _, column in columns], names=[name for name, _ in columns])
    return table.slice(0, draw(st.sampled_from([6, 6, 6, 1, 0])))


def as_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink, row_group_size=4)
    except pa.ArrowException:
        return b"Parquet has no place for such times"
    return sink.getvalue()


def as_stream(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


STATE = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "x", "_format_type": None}
SPLIT_DICT = {"splits": ["train"]}


def test_column_manifests(bench: Bench, prepare: tuple[object, ...]) -> None:
    whole = pa.Table.from_pylist(ROWS)
    bench.lay({**RECORDINGS, "rows.parquet": as_parquet(whole)})
    bench.sound(*prepare, "rows.parquet")
    stream = "set/data-00000-of-00001.arrow"
    recordings = {f"set/{name}": content for name, content in RECORDINGS.items()}
    bench.lay({**recordings, stream: as_stream(whole), "set/state.json": to_json(STATE)})
    bench.sound(*prepare, "set")
    parquet = _written(tables(), as_parquet).map(
        lambda content: ("rows.parquet", {**RECORDINGS, "rows.parquet": content})
    )
    shards = _written(tables(), as_parquet).map(
        lambda content: ("set", {**recordings, "set/train-00000.parquet": content})
    )
    state = changed(STATE).map(to_json) | st.just(to_json(STATE))
    folder = st.tuples(_written(tables(), as_stream), state).map(
        lambda pair: ("set", {**recordings, stream: pair[0], "set/state.json": pair[1]})
    )
    dict_folder = st.tuples(_written(tables(), as_stream), changed(SPLIT_DICT).map(to_json)).map(
        lambda pair: (
            "set",
            {
                "set/train/state.json": to_json(STATE),
                "set/train/data-00000-of-00001.arrow": pair[0],
                "set/dataset_dict.json": pair[1],
            },
        )
    )

    @bench.inputs(parquet | parquet | folder | shards | dict_folder, suite=40)
    def one(case: tuple[str, Files]) -> None:
        bench.lay(case[1])
        bench.run(*prepare, case[0])


def _written(drawn: st.SearchStrategy[pa.Table], write: Callable[[pa.Table], bytes]) -> st.SearchStrategy[bytes]:
    return drawn.map(write).flatmap(lambda content: maybe_torn(content, 5))
