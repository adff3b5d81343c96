"""Calls by which a file or a name from elsewhere could run code, found in a module's syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator

PICKLING = frozenset({"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"})
# Raised by torch for files that it refuses.
HARMLESS_IMPORTS = frozenset({("pickle", "UnpicklingError")})
BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
SHELLS = frozenset({"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"})
YAML = frozenset({"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"})
OUR_LOADER = "_UniqueKeyLoader"
# By keyword, the only value that it may have.
FIXED = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "autoescape": True}


def dangers(source: str) -> list[str]:
    """What is dangerous in a module, as `line: why`."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.expr | ast.stmt))
    return [f"{node.lineno}: {why}" for node in nodes for why in _of(node)]


def _of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"imports {name.name}" for name in node.names if name.name.split(".")[0] in PICKLING)
    elif isinstance(node, ast.ImportFrom):
        module = (node.module or "").split(".")[0]
        names = [name.name for name in node.names if (module, name.name) not in HARMLESS_IMPORTS]
        if module in PICKLING and names:
            yield f"imports {', '.join(names)} of {module}"
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                yield from _fixed(key.value, value)
    elif isinstance(node, ast.Call):
        for keyword in node.keywords:
            yield from _fixed(keyword.arg, keyword.value)
        yield from _of_call(ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords})


def _fixed(name: object, value: ast.expr) -> Iterator[str]:
    if name in FIXED and not (isinstance(value, ast.Constant) and value.value is FIXED[name]):
        yield f"{name} is not {FIXED[name]}"


def _of_call(function: str, keywords: dict[str | None, str]) -> Iterator[str]:
    module, _, name = function.rpartition(".")
    if function in BUILTINS or function in SHELLS:
        yield f"calls {function}"
    if function == "torch.load" and keywords.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if module == "yaml" and name in YAML and keywords.get("Loader") != OUR_LOADER:
        yield f"{function} without {OUR_LOADER}"
    if name == "from_pretrained" and "AutoModel" in module and keywords.get("use_safetensors") != "True":
        yield f"{function} without use_safetensors=True"
    if name == "extractall" and keywords.get("filter") not in ("'data'", '"data"'):
        yield f"{function} without filter='data'"
    if name == "Environment" and keywords.get("autoescape") != "True":
        yield f"{function} without autoescape=True"
    if name in ("Markup", "read_pickle") or function == "Markup":
        yield f"calls {function}"
