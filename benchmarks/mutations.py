"""Small faults to plant in a module: comparisons, arithmetic, conditions, constants, returns and lost calls.

Not planted: sentences (strings with a space, f-strings, what is raised), annotations, decorators, docstrings,
assertions, `strict=True` of a zip, and descriptions of fields. A fault that no test could see makes the score of
`mutants.py` mean less.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}
_UNSEEN = ("annotation", "returns", "decorator_list")


@dataclass(frozen=True)
class Mutation:
    """One change of one module: bytes `start` to `stop` become `after`.

    Attributes:
        lines: of the statement; a test that runs one of them may see the change.
        at_import: it runs when the module is imported, so every test of the module may.
    """

    module: str
    line: int
    before: str
    after: str
    start: int
    stop: int
    key: str  # the same for the same change of the same module
    lines: tuple[int, ...]
    at_import: bool

    def apply(self, source: bytes) -> bytes:
        """The module with the change."""
        return source[: self.start] + self.after.encode() + source[self.stop :]


def mutations_of(module: str, source: bytes) -> list[Mutation]:
    """All changes of a module that still compile, in the order of its lines."""
    found = _Finder(module, source)
    found.visit(ast.parse(source))
    return sorted(filter(found.compiles, found.mutations), key=lambda mutation: (mutation.start, mutation.after))


class _Finder(ast.NodeVisitor):
    def __init__(self, module: str, source: bytes) -> None:
        self.module, self.source = module, source
        self.mutations: list[Mutation] = []
        lengths = [len(line) for line in source.splitlines(keepends=True)]
        self._starts = [sum(lengths[:line]) for line in range(len(lengths))]
        self._lines: tuple[int, ...] = ()
        self._depth = 0  # of functions around

    def compiles(self, mutation: Mutation) -> bool:
        """Whether the module with the change is Python."""
        try:
            compile(mutation.apply(self.source), self.module, "exec")
        except SyntaxError:
            return False
        return True

    def visit(self, node: ast.AST) -> None:
        """Add the changes of a node and of those below it."""
        around = self._lines
        if isinstance(node, ast.stmt):
            body: list[ast.stmt] = getattr(node, "body", [])
            last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            self._lines = tuple(range(node.lineno, max(last, node.lineno) + 1))
        if not isinstance(node, ast.Assert | ast.JoinedStr) and not _is_docstring(node):
            for changed, after in _changes(node, self._depth > 0):
                self._add(changed, after)
            if not isinstance(node, ast.Raise):
                self._go_down(node)
        self._lines = around

    def _go_down(self, node: ast.AST) -> None:
        for name, value in ast.iter_fields(node):
            if name in _UNSEEN or (isinstance(node, ast.If) and _is_name(node.test, "TYPE_CHECKING")):
                continue
            inside = name == "body" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            self._depth += inside
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not (
                    isinstance(child, ast.keyword) and child.arg in ("description", "strict")
                ):
                    self.visit(child)
            self._depth -= inside

    def _add(self, node: ast.AST, after: ast.AST) -> None:
        assert isinstance(node, ast.expr | ast.stmt)
        start = self._starts[node.lineno - 1] + node.col_offset
        stop = self._starts[(node.end_lineno or 1) - 1] + (node.end_col_offset or 0)
        text = ast.unparse(ast.fix_missing_locations(after))
        text = f"({text})" if isinstance(node, ast.expr) and not isinstance(node, ast.Constant) else text
        before = " ".join(self.source[start:stop].decode().split())
        content = self.module.encode() + self.source[:start] + text.encode() + self.source[stop:]
        key = hashlib.sha256(content).hexdigest()[:16]
        lines, at_import = self._lines, self._depth == 0
        self.mutations.append(Mutation(self.module, node.lineno, before, text, start, stop, key, lines, at_import))


def _changes(node: ast.AST, in_function: bool) -> Iterator[tuple[ast.AST, ast.AST]]:
    """What becomes what: the node itself, or a condition in it that is one name or call."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in _SWAPS:
            yield node, _with(node, ops=[_SWAPS[type(op)]()])
        # Outside functions, `|` joins types.
        case ast.BinOp(op=op) if type(op) in _SWAPS and (in_function or not isinstance(op, ast.BitOr)):
            yield node, _with(node, op=_SWAPS[type(op)]())
        case ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in _SWAPS:
            yield node, _with(node, op=_SWAPS[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield node, operand
        case ast.Constant(value=bool() as value):
            yield node, ast.Constant(not value)
        case ast.Constant(value=int() as value):
            yield node, ast.Constant(value + 1)
        case ast.Constant(value=float() as value):
            yield node, ast.Constant(value * 2 or 1.0)
        case ast.Constant(value=str() as value) if value and " " not in value:
            yield node, ast.Constant(f"XX{value}")
        case ast.Call(func=ast.Name(id=name), keywords=keywords) if name in _CALLS and not (
            name == "sorted" and keywords
        ):
            yield node, _with(node, func=ast.Name(_CALLS[name]))
        case ast.Return(value=ast.expr() as value) if not _is_none(value):
            yield node, ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.Raise():
            yield node, ast.Pass()
    for condition in [getattr(node, "test", None), *getattr(node, "ifs", [])]:
        if isinstance(condition, ast.Name | ast.Call | ast.Attribute):
            yield condition, ast.UnaryOp(ast.Not(), condition)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
