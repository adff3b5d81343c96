"""Files in a place that outlives the machines: a folder, or a bucket (s3://, gs://), through pyarrow's file systems.

Readers find a file whole or not at all: a bucket shows an object when all of it has arrived, a folder when it is
renamed. A storage that is away or full is asked again for about two minutes, then one sentence says so. Credentials
are refused in a URI, since lists of processes and the Ray dashboard would show them: they come from where the cloud's
own tools look for them.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from tuner.errors import ConfigError, StorageError
from tuner.patience import Wait, patience_seconds
from tuner.redact import holds_secret
from tuner.storage_faults import read_fault

Answer = TypeVar("Answer")

CHUNK_BYTES = 16 * 1024**2
PARTIAL = ".partial"
SCHEMES = ("file", "s3", "gs", "gcs")
# Google's client alone would retry for 15 minutes, and with what it takes for a moment's fault.
GOOGLE_RETRY = "retry_limit_seconds=10"


def is_uri(text: str) -> bool:
    """Whether this names a place by scheme, `s3://bucket/path`, and not a plain folder."""
    return re.match(r"^[a-zA-Z][a-zA-Z0-9+.-]*://", text) is not None


@dataclass(frozen=True)
class Storage:
    """A place for files, named by relative POSIX paths; make one with `Storage.parse`. Cheap to copy and to pickle.

    Attributes:
        uri: of the whole place, without credentials.
        prefix: the part of it that names are relative to; see `at`.
        patience: seconds for which a fault is tried again; None: `patience_seconds()`.
    """

    uri: str
    prefix: str = ""
    patience: float | None = None

    @classmethod
    def parse(cls, uri: str) -> Storage:
        """The storage at a local path, file://, s3:// or gs://. Nothing is asked yet.

        Raises:
            ConfigError: another scheme, no bucket, or credentials in the URI. An option that Arrow does not know shows
                at the first use.
        """
        if not is_uri(uri):
            return cls(str(Path(uri).expanduser().absolute()))
        scheme = uri.split("://", 1)[0].lower()
        if scheme not in SCHEMES:
            raise ConfigError(f"{uri}: give a folder, s3://bucket/path or gs://bucket/path")
        if holds_secret(uri):
            raise ConfigError(
                f"{uri}: holds credentials, which lists of processes would show; give them as the cloud's own tools "
                "take them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, the role of the machine)"
            )
        if scheme == "file":
            if not uri.startswith("file:///"):
                raise ConfigError(f"{uri}: write file:///folder, with three slashes, or the folder alone")
            return cls(uri)
        if not urlsplit(uri).netloc:
            raise ConfigError(f"{uri}: names no bucket; give {scheme}://bucket/path")
        return cls(uri)

    def __str__(self) -> str:
        """Where it is, for people: without the options of the URI."""
        place = (self.uri.split("?", 1)[0] if is_uri(self.uri) else self.uri).rstrip("/")
        return f"{place}/{self.prefix}" if self.prefix else place

    @property
    def place(self) -> str:
        """The path or URI of just this folder, as `parse` takes it."""
        if not self.prefix:
            return self.uri
        options = f"?{self.uri.split('?', 1)[1]}" if is_uri(self.uri) and "?" in self.uri else ""
        return f"{self}{options}"

    def at(self, *names: str) -> Storage:
        """A folder of it as a storage of its own."""
        return replace(self, prefix="/".join(part for part in (self.prefix, *names) if part))

    def patient(self, seconds: float) -> Storage:
        """The same place, with faults tried again for so long."""
        return replace(self, patience=seconds)

    def upload(self, local: Path, name: str) -> None:
        """Put a file there, in place of an older one of this name.

        Raises:
            StorageError: the storage is away or full for longer than its patience, or access is denied.
        """
        # Mapped and written in one call: nothing that happens to this process can end an upload half way and close it.
        content = pa.memory_map(str(local)).read_buffer() if local.stat().st_size else pa.py_buffer(b"")
        self._try(name, lambda: self._put(name, content))

    def write(self, name: str, content: bytes) -> None:
        """Put a few bytes there; raises as `upload`."""
        self._try(name, lambda: self._put(name, pa.py_buffer(content)))

    def upload_folder(self, local: Path, name: str, last: str = "") -> None:
        """Put all files of a folder there, file by file, the one called `last` after the others; raises as `upload`."""
        files = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
        for file in sorted(files, key=lambda file: file == last):
            self.upload(local / file, f"{name}/{file}")

    def download(self, name: str, local: Path) -> None:
        """Bring a file here under a temporary name and rename it.

        Raises:
            StorageError: there is no such file, it cannot be written here, or as `upload`.
        """
        staged = local.with_name(f".{local.name}.{uuid.uuid4().hex}{PARTIAL}")
        _make_folder(local.parent)
        try:
            self._try(name, lambda: self._get(name, staged))
            staged.replace(local)
        except FileNotFoundError:
            raise StorageError(f"{self}/{name}: is not there") from None
        finally:
            staged.unlink(missing_ok=True)

    def download_folder(self, name: str, local: Path) -> None:
        """Bring all files below `name` here, in place of a folder that is here; raises as `download`."""
        source = self.at(name)
        files = source.names()
        if not files:
            raise StorageError(f"{source}: nothing is there")
        staged = local.with_name(f".{local.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            for file in files:
                if ".." in PurePosixPath(file).parts:
                    raise StorageError(f"{source}/{file}: leads out of the folder; remove it there")
                source.download(file, staged / file)
            shutil.rmtree(local, ignore_errors=True)
            staged.rename(local)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def read(self, name: str) -> bytes | None:
        """The content of a small file, None where there is none; raises as `upload`."""
        try:
            return self._try(name, lambda: self._read(name))
        except FileNotFoundError:
            return None

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name; raises as `upload`."""
        info = self._try(name, lambda: self._reach().get_file_info(self._path(name)))
        return bool(info.type == pafs.FileType.File)

    def names(self) -> list[str]:
        """Names of all files in it, sorted; raises as `upload`."""
        found = self._try("", lambda: self._find(recursive=True))
        root = self._path("")
        names = [info.path.removeprefix(root).lstrip("/") for info in found if info.type == pafs.FileType.File]
        return sorted(name for name in names if not name.endswith(PARTIAL))

    def folders(self) -> list[str]:
        """Names of the folders in it, sorted; raises as `upload`."""
        if isinstance(self._try("", self._reach), pafs.GcsFileSystem):
            # There Arrow lists a folder only if it was made as one, and ours are parts of names.
            return sorted({name.split("/", 1)[0] for name in self.names() if "/" in name})
        found = self._try("", lambda: self._find(recursive=False))
        return sorted(info.base_name for info in found if info.type == pafs.FileType.Directory)

    def remove(self, name: str) -> None:
        """Delete a file, if it is there; raises as `upload`."""
        with suppress(FileNotFoundError):
            self._try(name, lambda: self._reach().delete_file(self._path(name)))

    def _reach(self) -> Any:
        return _file_system(self.uri)[0]

    def _path(self, name: str) -> str:
        return "/".join(part for part in (_file_system(self.uri)[1], self.prefix, name) if part)

    def _find(self, recursive: bool) -> list[Any]:
        selector = pafs.FileSelector(self._path(""), allow_not_found=True, recursive=recursive)
        found: list[Any] = self._reach().get_file_info(selector)
        return found

    def _put(self, name: str, content: Any) -> None:
        system, path = self._reach(), self._path(name)
        if not isinstance(system, pafs.LocalFileSystem):
            with system.open_output_stream(path) as stream:
                stream.write(content)
            return
        folder, _, file = path.rpartition("/")
        staged = f"{folder}/.{file}.{uuid.uuid4().hex}{PARTIAL}"
        system.create_dir(folder)
        try:
            with system.open_output_stream(staged) as stream:
                stream.write(content)
            system.move(staged, path)
        finally:
            Path(staged).unlink(missing_ok=True)

    def _get(self, name: str, local: Path) -> None:
        with self._reach().open_input_file(self._path(name)) as source:
            left = source.size()
            try:
                file = local.open("wb")
            except OSError as error:
                raise _local_fault(local.parent, error) from None
            with file:
                while left:
                    chunk = source.read_buffer(min(left, CHUNK_BYTES))
                    if not chunk.size:
                        raise OSError("it ends too early")
                    left -= chunk.size
                    try:
                        file.write(chunk)
                    except OSError as error:
                        raise _local_fault(local.parent, error) from None

    def _read(self, name: str) -> bytes:
        with self._reach().open_input_stream(self._path(name)) as source:
            content: bytes = source.read()
        return content

    def _try(self, name: str, call: Callable[[], Answer]) -> Answer:
        """Call, and again after a fault that may pass. `FileNotFoundError` is an answer, not a fault."""
        wait = Wait(patience_seconds() if self.patience is None else self.patience)
        while True:
            try:
                return call()
            except OSError as error:
                fault = read_fault(error, wait.seconds)
                if fault is None:
                    raise
                if not fault.passes or wait.over:
                    where = f"{self}/{name}" if name else str(self)
                    raise StorageError(f"{where}: {fault.sentence}") from None
            wait.pause()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _local_fault(folder, error) from None


def _local_fault(folder: Path, error: OSError) -> StorageError:
    return StorageError(f"{folder}: cannot be written ({error.strerror}); make room on this machine")


@lru_cache(maxsize=16)
def _file_system(uri: str) -> tuple[Any, str]:
    """Arrow's file system of a URI and the path in it.

    Raises:
        ConfigError: Arrow does not understand the URI.
        OSError: the region of a bucket cannot be found out.
    """
    if uri.startswith(("gs:", "gcs:")) and "retry_limit_seconds=" not in uri:
        uri += f"{'&' if '?' in uri else '?'}{GOOGLE_RETRY}"
    try:
        system, path = pafs.FileSystem.from_uri(uri)
    except (ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{uri}: not understood ({reason[:200]}); correct the URI") from None
    return system, path.rstrip("/")
