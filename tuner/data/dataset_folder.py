"""Dataset folders as Hugging Face's `datasets` knows them: which files they have, and which split each file is.

Three kinds are read: what `save_to_disk` leaves (Arrow streams with `state.json`, or `dataset_dict.json` and a folder
per split), also of several configurations below one folder; Parquet shards as they lie in a hub repository
(`train-00000-of-00002.parquet`); and audio folders (`metadata.csv` or `metadata.jsonl` beside the recordings).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tuner.data.columns import audio_value, split_word
from tuner.data.tables import Row, read_table
from tuner.data.text_files import read_text_rows
from tuner.errors import DataError
from tuner.near import shown
from tuner.plain_json import parse_json

DICT_FILE, STATE_FILE = "dataset_dict.json", "state.json"
METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
_File = tuple[Path, str | None]  # and the name of its split


def read_dataset_folder(folder: Path) -> Iterator[tuple[int, Row]]:
    """Rows of all files of a dataset folder, counted from 1 through all files.

    The split comes from a `split` column, else from the folder's split or the shard's name.

    Raises:
        DataError: the folder holds no dataset, one of its files is damaged, or some of its files name a split and
            others none.
    """
    shards = sorted(file for file in folder.rglob("*.parquet") if not file.name.startswith((".", "metadata.")))
    saved = _saved_files(folder)
    if saved or (shards and not any(folder.glob(f"**/{DICT_FILE}"))):
        files = saved or [(shard, _split_of_place(shard, folder)) for shard in shards]
        return enumerate(_rows_of_files(folder, files), start=1)
    metadata = sorted(file for name in METADATA for file in folder.rglob(name))
    if metadata:
        return enumerate(_audio_folder_rows(folder, metadata), start=1)
    raise DataError(
        f"{folder}: not a dataset folder (no {STATE_FILE}, {DICT_FILE}, .parquet files or metadata.csv); "
        "give the folder that save_to_disk wrote, or a manifest file"
    )


def _saved_files(folder: Path) -> list[_File]:
    """The Arrow files that `save_to_disk` wrote here, or once for each configuration somewhere below."""
    if (folder / DICT_FILE).exists():
        splits = _json_field(folder / DICT_FILE, "splits")
        named = [(_below(folder, name), str(name)) for name in splits]
        # A name that is no split is kept: the row that has it is refused by that name.
        return [(file, split_word(name) or name) for below, name in named for file in _stream_files(below)]
    if (folder / STATE_FILE).exists():
        return [(file, None) for file in _stream_files(folder)]
    dicts = sorted(path.parent for path in folder.rglob(DICT_FILE))
    found = [file for configuration in dicts for file in _saved_files(configuration)]
    for path in sorted(folder.rglob(STATE_FILE)):
        if not any(path.is_relative_to(configuration) for configuration in dicts):
            found += [(file, _split_of_place(path, folder)) for file in _stream_files(path.parent)]
    return found


def _stream_files(folder: Path) -> list[Path]:
    entries = _json_field(folder / STATE_FILE, "_data_files")
    return [_below(folder, entry.get("filename") if isinstance(entry, dict) else None) for entry in entries]


def _below(folder: Path, name: object) -> Path:
    """A split or file that the folder's own JSON names: it was downloaded too, and could name any place."""
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name or Path(name).name != name:
        raise DataError(
            f"{folder}: names the file {shown(name)} outside its folder; the dataset is damaged, save it again"
        )
    return folder / name


def _json_field(path: Path, field: str) -> list[Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))[field]
    except (OSError, ValueError, KeyError, TypeError):
        value = None
    if not isinstance(value, list):
        raise DataError(f"{path}: no list `{field}`; the dataset folder is damaged, save it again")
    return value


def _split_of_place(file: Path, folder: Path) -> str | None:
    """Hub repositories name shards `train-00000-of-00002.parquet`, or keep each split in a folder of that name."""
    names = (file.stem, *(part.name for part in file.relative_to(folder).parents))
    return next((word for name in names if (word := split_word(name))), None)


def _rows_of_files(folder: Path, files: Iterable[_File]) -> Iterator[Row]:
    named: Path | None = None
    unnamed: Path | None = None
    for file, split in files:
        own_split = False
        for row in read_table(file):
            own_split = own_split or row.get("split") is not None
            yield row if split is None or row.get("split") is not None else {**row, "split": split}
        if split is not None:
            named = named or file
        elif not own_split:
            unnamed = unnamed or file
        _check_all_or_none(folder, named, unnamed)


def _audio_folder_rows(folder: Path, metadata: Iterable[Path]) -> Iterator[Row]:
    """Recordings are named relative to the metadata; their folders name the split, as `datasets` takes it."""
    named: Path | None = None
    unnamed: Path | None = None
    for file in metadata:
        rows = enumerate(read_table(file)) if file.suffix == ".parquet" else read_text_rows(file)
        below = PurePosixPath(file.parent.relative_to(folder).as_posix())
        for _, row in rows:
            found, place = _audio_folder_row(folder, below, row)
            if found.get("split") is None:
                unnamed = unnamed or place
            elif not row.get("split"):
                named = named or place
            _check_all_or_none(folder, named, unnamed)
            yield found


def _audio_folder_row(folder: Path, below: PurePosixPath, row: Row) -> tuple[Mapping[str, object], Path]:
    """The row with its recording relative to the dataset's folder and its split, and the recording's place."""
    name = audio_value(row)
    if not isinstance(name, str):
        return row, folder / below
    place = name if name.startswith("file://") else str(below / name.replace("\\", "/"))
    parents = PurePosixPath(place).parents if not place.startswith(("/", "file:")) else (below, *below.parents)
    split = next((word for parent in parents if (word := split_word(parent.name))), None)
    return {**row, "audio": place, "split": row.get("split") or split}, folder / place


def _check_all_or_none(folder: Path, named: Path | None, unnamed: Path | None) -> None:
    if named is not None and unnamed is not None:
        raise DataError(
            f"{folder}: {_short(named, folder)} is of one split by its name, {_short(unnamed, folder)} of none, and "
            "would be drawn into all of them; name each file or its folder train, validation or test, or none"
        )


def _short(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
