"""What keeps the house in order: import layers, light imports, and modules and functions of a readable size."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from dangerous_calls import dangers

import tuner

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = sorted((REPOSITORY / "tuner").rglob("*.py"))
MODULES = [module.name for module in pkgutil.walk_packages(tuner.__path__, "tuner.")]
LONGEST_MODULE = 320
LONGEST_FUNCTION = 60


def below(*packages: str) -> list[str]:
    """All modules of some packages, themselves included."""
    found = [name for name in MODULES if any(name == p or name.startswith(f"{p}.") for p in packages)]
    assert all(package in found for package in packages)
    return found


def test_imports_go_downward_only() -> None:
    """The contracts are in pyproject.toml, for `make check` and for here. In a process of its own: the linter silences
    every logger that there is."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--config", "pyproject.toml", "--no-cache"]
    checked = subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


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


@pytest.mark.parametrize(
    ("packages", "forbidden"),
    [
        (("tuner.cli", "tuner.commands"), ("torch", "transformers", "peft", "ray", "optuna", "pyarrow", "numpy")),
        (
            ("tuner.space", "tuner.config", "tuner.errors", "tuner.redact", "tuner.pareto"),
            ("torch", "transformers", "ray", "optuna"),
        ),
        (("tuner.service",), ("torch", "transformers", "peft", "ray", "optuna")),
        (("tuner.search",), ("torch", "transformers", "peft")),
        (("tuner.lanes",), ("torch", "transformers", "peft", "optuna")),
        (("tuner.report", "tuner.lora.placement"), ("torch", "transformers", "peft", "ray", "optuna")),
        (("tuner.encoders.registry", "tuner.encoders.spec"), ("torch", "transformers", "peft", "ray")),
        (("tuner.train", "tuner.diagnose"), ("ray", "optuna")),
    ],
)
def test_importing_stays_light(packages: tuple[str, ...], forbidden: tuple[str, ...]) -> None:
    """In a process of its own: what a module imports at its top, and what that imports in turn."""
    script = (
        "import importlib, sys\n"
        f"for name in {below(*packages)!r}:\n    importlib.import_module(name)\n"
        f"print([name for name in {forbidden!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_modules_and_functions_can_be_read_at_once(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= LONGEST_MODULE, f"{lines} lines; split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines; split it"


def test_no_module_collects_leftovers() -> None:
    assert not [path.name for path in SOURCES if path.stem in ("utils", "helpers", "common", "misc")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_file_of_others_can_run_code(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import os, cloudpickle",
        "from pickle import loads, UnpicklingError",
        "import joblib.memory",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.FullLoader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "__import__(name)",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=flag)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "transformers.AutoModel.from_pretrained(folder)",
        "np.load(path, allow_pickle=True)",
        "archive.extractall(folder)",
        "jinja2.Environment(loader=loader)",
        "jinja2.Environment(autoescape=False)",
        "Markup(text)",
    ],
)
def test_what_could_run_code_is_found(line: str) -> None:
    assert len(dangers(f"x = 1\n{line}\n")) >= 1


def test_what_cannot_is_not() -> None:
    lines = (
        "from pickle import UnpicklingError",
        "torch.load(path, weights_only=True)",
        "yaml.load_all(text, Loader=_UniqueKeyLoader)",
        "re.compile(pattern)",
        "model.eval()",
        "archive.extractfile(member)",
        "options = {'trust_remote_code': False}",
    )
    assert dangers("\n".join(lines)) == []
