"""What keeps the house in order beyond `make check`: light imports, short modules, and the settings of the linters."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

import tuner

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = sorted((REPOSITORY / "tuner").rglob("*.py"))
MODULES = [module.name for module in pkgutil.walk_packages(tuner.__path__, "tuner.")]
LONGEST_MODULE = 320
GROUND = ("tuner.space", "tuner.config", "tuner.errors", "tuner.redact", "tuner.study")
ENCODER_FACTS = ("tuner.encoders.registry", "tuner.encoders.spec")


def below(*packages: str) -> list[str]:
    """All modules of some packages, themselves included."""
    found = [name for name in MODULES if any(name == p or name.startswith(f"{p}.") for p in packages)]
    assert all(package in found for package in packages)
    return found


def test_every_module_has_a_layer() -> None:
    """A new one must be given its place, or the contract would not see it."""
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    placed = {module.strip() for layer in layers for module in layer.split("|")}
    for module in MODULES:
        children = any(other.startswith(f"{module}.") for other in MODULES)
        split = children and any(layer.startswith(f"{module}.") for layer in placed)
        assert split or any(module == layer or module.startswith(f"{layer}.") for layer in placed), module
    assert placed <= set(MODULES), "a layer that is no longer there"


# What a command imports when it runs, and its `--help` does not.
ACTIONS = "tuner.commands.actions"


@pytest.mark.parametrize(
    "steps",
    [
        (
            (("tuner.cli", "tuner.commands"), ("torch", "transformers", "peft", "ray", "optuna", "pyarrow", "numpy")),
            (
                (*GROUND, "tuner.service", "tuner.report", "tuner.lora.placement", *ENCODER_FACTS),
                ("torch", "transformers", "peft", "ray", "optuna"),
            ),
            (("tuner.lanes",), ("torch", "transformers", "peft", "optuna")),
            (("tuner.search",), ("torch", "transformers", "peft")),
        ),
        ((("tuner.train", "tuner.diagnose"), ("ray", "optuna")),),
    ],
    ids=["driver", "training"],
)
def test_importing_stays_light(steps: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]) -> None:
    """What modules import at their top, and what that imports in turn. One process takes the steps, each of which
    may import what the one before may and more."""
    for (_, more), (_, fewer) in pairwise(steps):
        assert set(more) > set(fewer)
    script = "import importlib, sys\n"
    for packages, forbidden in steps:
        modules = [name for name in below(*packages) if not name.startswith(ACTIONS)]
        script += f"for name in {modules!r}:\n    importlib.import_module(name)\n"
        script += f"print({packages[0]!r}, [name for name in {forbidden!r} if name in sys.modules])\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.splitlines() == [f"{packages[0]} []" for packages, _ in steps]


def test_a_module_can_be_read_at_once() -> None:
    """Functions are ruff's to measure."""
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: length for name, length in lines.items() if length > LONGEST_MODULE} == {}, "split them"


def test_no_module_collects_leftovers() -> None:
    assert not [path.name for path in SOURCES if path.stem in ("utils", "helpers", "common", "misc")]


# One for each way in which a file or a name from elsewhere could run code.
DANGEROUS = """\
import pickle
import os, cloudpickle
from pickle import loads
import joblib.memory
torch.load(path)
yaml.load(text, Loader=yaml.FullLoader)
yaml.unsafe_load(text)
eval(text)
exec(text)
os.system(command)
subprocess.run(command, shell=True)
transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
transformers.AutoModel.from_pretrained(folder)
numpy.load(path, allow_pickle=True)
tarfile.open(path).extractall(folder)
jinja2.Environment(loader=loader)
jinja2.Environment(autoescape=False)
markupsafe.Markup(text)
"""


def test_ruff_refuses_what_could_run_code_of_others() -> None:
    """`make check` holds the sources to it; here, that its settings cover each way."""
    imports = "import jinja2, markupsafe, numpy, os, subprocess, tarfile, torch, transformers, yaml\n"
    ruff = [str(Path(sys.executable).parent / "ruff"), "check", "--no-cache", "--output-format", "json"]
    command = [*ruff, "--stdin-filename", "tuner/made_up.py", "-"]
    text = imports + DANGEROUS
    checked = subprocess.run(command, check=False, cwd=REPOSITORY, input=text, capture_output=True, text=True)
    findings = json.loads(checked.stdout)
    found = {finding["location"]["row"] for finding in findings if finding["code"].startswith(("S", "TID"))}
    assert found >= set(range(2, 2 + len(DANGEROUS.splitlines())))
