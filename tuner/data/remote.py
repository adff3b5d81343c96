"""Prepared stores in a bucket: uploaded once, downloaded once a node and memory-mapped from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuner.data.cache import cache_root
from tuner.data.store import FORMAT, META_FILE, Store, StoreMeta, read_meta
from tuner.data.writer import disk_faults, new_folder, only_writer
from tuner.errors import DataError, Field
from tuner.plain_json import parse_json
from tuner.storage import Storage, is_uri

STORES = "stores"


def open_store(place: str) -> Store:
    """Open a store in a folder, or in a storage by way of this node's cache.

    Raises:
        DataError: as `Store.open` and `fetch_store`.
        StorageError: the storage is away, or access is denied.
    """
    return Store.open(fetch_store(place) if is_uri(place) else Path(place))


def fetch_store(uri: str) -> Path:
    """Bring a store into this node's cache, unless it is there already; the folder is named by its fingerprint.

    Raises:
        DataError: there is no store, or the disk is full.
        StorageError: the storage is away, or access is denied.
    """
    storage = Storage.parse(uri)
    meta = _remote_meta(storage)
    if meta is None:
        raise DataError(
            f"{uri}: not a complete store (no valid {META_FILE}); make one with `tuner prepare --out {uri}`"
        )
    target = cache_root() / STORES / str(meta["fingerprint"])
    with disk_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # Lanes and workers of one node start together: the first downloads, the others find it.
        with only_writer(target):
            if not _is_whole(target, meta):
                with new_folder(target) as folder:
                    for name in meta["files"]:
                        storage.download(name, folder / name)
                    storage.download(META_FILE, folder / META_FILE)
    return target


def upload_store(folder: Path, storage: Storage) -> None:
    """Put a store into a storage, unless this very one is there; another store is replaced.

    Raises:
        DataError: `folder` holds no store, or there is something else than a store there.
        StorageError: the storage is away or full, or access is denied.
    """
    store = Store.open(folder)
    there = _remote_meta(storage)
    if there is not None and (there["fingerprint"], there["files"]) == (store.fingerprint, store.meta["files"]):
        return
    if there is None and META_FILE not in (names := storage.names()) and set(names) - set(store.meta["files"]):
        raise DataError(f"{storage}: holds other files and is not a store; give a new place with ", Field("out"))
    # While parts of two stores lie side by side, there is none.
    storage.remove(META_FILE)
    for name in (*store.meta["files"], META_FILE):
        storage.upload(folder / name, name)


def _remote_meta(storage: Storage) -> dict[str, Any] | None:
    """The contents of a storage's `store.json`, None where it is no store."""
    content = storage.read(META_FILE)
    try:
        meta: dict[str, Any] | None = parse_json(content) if content is not None else None
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            return None
        StoreMeta.parse(meta)
    except ValueError:
        return None
    return meta


def _is_whole(folder: Path, meta: dict[str, Any]) -> bool:
    if (here := read_meta(folder)) is None or here.get("files") != meta["files"]:
        return False
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    return all(sizes.get(name) == size for name, size in meta["files"].items())
