"""The structure of `tuner` in figures, today and at an earlier commit: `python -m benchmarks.structure --at COMMIT`.

Modules; imports inside functions; public signatures that hold `Any`, `object` or a bare `dict`; import circles (sets of
modules that reach one another, imports inside functions and for types included).
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

ROOMS = ("study", "search", "report", "commands")
UNTYPED = frozenset({"Any", "object"})
BARE = frozenset({"dict", "list", "tuple"})


@dataclass(frozen=True)
class Structure:
    """Figures of one source tree; the typed rooms are those that other rooms call."""

    modules: int
    lines: int
    inner_imports: int
    inner_imports_of_commands: int
    untyped_signatures: int
    untyped_in_rooms: int
    circles: list[list[str]]


def structure_of(package: Path) -> Structure:
    """Measure the package in a folder named like it."""
    trees = {
        _name(path, package): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))
    }
    untyped = {name: sum(map(_is_untyped, _public_functions(tree))) for name, tree in trees.items()}
    inner = {name: sum(1 for _ in _inner_imports(tree)) for name, tree in trees.items()}
    rooms = tuple(f"{package.name}.{room}" for room in ROOMS)
    return Structure(
        modules=len(trees),
        lines=sum(len(path.read_text(encoding="utf-8").splitlines()) for path in package.rglob("*.py")),
        inner_imports=sum(inner.values()),
        inner_imports_of_commands=sum(n for name, n in inner.items() if name.startswith(f"{package.name}.commands")),
        untyped_signatures=sum(untyped.values()),
        untyped_in_rooms=sum(n for name, n in untyped.items() if name.startswith(rooms)),
        circles=circles({name: _imports(tree, name, trees.keys()) for name, tree in trees.items()}),
    )


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected sets of more than one module (Tarjan 1972), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in imports[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            place = stack.index(node)
            members = sorted(stack[place:])
            del stack[place:]
            if len(members) > 1:
                found.append(members)

    for node in imports:
        if node not in index:
            visit(node)
    return sorted(found)


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _public_functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods that other modules may call; functions inside functions are nobody else's."""
    inner = {id(node) for function in _functions(tree) for node in _functions(function) if node is not function}
    yield from (node for node in _functions(tree) if id(node) not in inner and not node.name.startswith("_"))


def _is_untyped(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    annotations = [argument.annotation for argument in every] + [function.returns]
    return any(annotation is not None and _holds_untyped(annotation) for annotation in annotations)


def _holds_untyped(annotation: ast.expr) -> bool:
    filled = {id(node.value) for node in ast.walk(annotation) if isinstance(node, ast.Subscript)}
    names = [node for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    return any(node.id in UNTYPED or (node.id in BARE and id(node) not in filled) for node in names)


def _inner_imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    seen: set[int] = set()
    for function in _functions(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in seen:
                seen.add(id(node))
                yield node


def _imports(tree: ast.AST, name: str, known: Iterable[str]) -> set[str]:
    """Modules of the package that this one imports anywhere."""
    modules = set(known)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    # `from package import module` names both; the package alone holds nothing.
    return {module for module in found & modules if module != name and not name.startswith(f"{module}.")}


def main() -> None:
    """Print the figures of this checkout and, with `--at`, those of a commit beside them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--at", help="a commit to compare with")
    at: str | None = parser.parse_args().at
    root = Path(__file__).resolve().parents[1]
    columns = [structure_of(root / "tuner")]
    if at is not None:
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / "tuner.tar"
            command = ["git", "-C", str(root), "archive", "--output", str(archive), at, "tuner"]
            subprocess.run(command, check=True)
            with tarfile.open(archive) as file:
                file.extractall(folder, filter="data")
            columns.insert(0, structure_of(Path(folder) / "tuner"))
    typer.echo(f"{'':<55}" + "".join(f"{title:>12}" for title in ([at[:10]] if at else []) + ["here"]))
    for label, pick in LABELS.items():
        typer.echo(f"{label:<55}" + "".join(f"{getattr(column, pick):>12,}" for column in columns))
    typer.echo(f"{'import circles':<55}" + "".join(f"{len(column.circles):>12}" for column in columns))
    for circle in columns[-1].circles:
        typer.echo("  " + " <-> ".join(circle))


LABELS = {
    "modules": "modules",
    "lines": "lines",
    "imports inside functions": "inner_imports",
    "of these in commands": "inner_imports_of_commands",
    "public signatures with Any, object or a bare dict": "untyped_signatures",
    "of these in study, search, report, commands": "untyped_in_rooms",
}


if __name__ == "__main__":
    main()
