"""Where search spaces are found by name: in a folder of the user, of the repository, or of the installed package."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from tuner.errors import SpaceError
from tuner.space.checks import nearest
from tuner.space.search_space import SearchSpace

SUFFIXES = (".yaml", ".yml")


def space_folders() -> list[Path]:
    """Folders to search, in order: $TUNER_SPACES, the repository's, the installed one.

    Raises:
        SpaceError: $TUNER_SPACES is set to something that is not a folder.
    """
    own = os.environ.get("TUNER_SPACES")
    if own and not Path(own).is_dir():
        raise SpaceError(f"TUNER_SPACES={own}: is not a folder; set it to a folder of YAML files or unset it")
    beside_package = Path(__file__).resolve().parents[2] / "search_spaces"
    installed = Path(sysconfig.get_path("data")) / "share" / "tuner" / "search_spaces"
    return [folder for folder in (Path(own) if own else None, beside_package, installed) if folder and folder.is_dir()]


def load_space(name_or_path: str, folders: Sequence[Path] | None = None) -> SearchSpace:
    """Load a space by name from `folders` (default `space_folders()`), or from the path of a YAML file.

    Raises:
        SpaceError: there is no such space (suggests the nearest and lists all), or its file is not valid.
    """
    path = Path(name_or_path)
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        return SearchSpace.from_file(path)
    files = _files(folders)
    if name_or_path not in files:
        raise SpaceError(
            f"there is no search space {name_or_path!r}{nearest(name_or_path, files)}; "
            f"use one of {', '.join(sorted(files)) or 'none'}, or give the path of a YAML file"
        )
    return SearchSpace.from_file(files[name_or_path])


def list_spaces(folders: Sequence[Path] | None = None) -> list[SearchSpace]:
    """All spaces that `load_space` finds by name, sorted by name.

    Raises:
        SpaceError: a file is not a valid space.
    """
    return [SearchSpace.from_file(path) for _, path in sorted(_files(folders).items())]


def _files(folders: Sequence[Path] | None) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for folder in space_folders() if folders is None else folders:
        for path in sorted(folder.iterdir()):
            if path.suffix in SUFFIXES:
                files.setdefault(path.stem, path)
    return files
