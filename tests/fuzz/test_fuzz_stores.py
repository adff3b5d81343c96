"""Prepared stores and exported adapters: torn files, changed values, tables of other types."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from conftest import Tiny
from fuzzing import Bench, Files
from generators import RAW, YAML_RAW, changed, to_json, torn
from hypothesis import strategies as st
from safetensors.numpy import load, save
from trained_adapter import train_and_export

from tuner.commands.actions import adapters as adapter_actions
from tuner.config import LoraSpec, TrialConfig

ALL = RAW | YAML_RAW


def files_of(folder: Path, below: str = "") -> dict[str, bytes]:
    """All files of a folder by their names below `below`."""
    return {f"{below}{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def adapter(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TrialConfig(lora=LoraSpec(rank=2, targets=("q_proj", "v_proj")))
    return train_and_export(tiny, config, tmp_path_factory.mktemp("trained")).folder


# Stores


def as_file(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


ODD_COLUMNS: tuple[Any, ...] = (
    pa.array([0] * 60, pa.int32()),
    pa.array([-1] * 60, pa.int32()),
    pa.array([127] * 60, pa.int8()),
    pa.array([2**31 - 1] * 60, pa.int32()),
    pa.array([2**62] * 60, pa.int64()),
    pa.array([float("nan")] * 60, pa.float32()),
    pa.array(["x"] * 60),
    pa.array([None] * 60, pa.int32()),
    pa.array([[]] * 60, pa.list_(pa.int64())),
    pa.array([[10**6]] * 60, pa.list_(pa.int64())),
    pa.array([[-1, None]] * 60, pa.list_(pa.int64())),
    pa.array([[1.0]] * 60, pa.list_(pa.float32())),
)


@st.composite
def odd_tables(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with columns of other values or types, dropped or renamed, or with fewer rows."""
    table = pa.ipc.open_file(content).read_all()
    place = draw(st.integers(0, table.num_columns - 1))
    name = table.column_names[place]
    match draw(st.sampled_from(["replace", "replace", "drop", "rename", "rows", "add"])):
        case "replace":
            column = draw(st.sampled_from(ODD_COLUMNS))
            return as_file(table.set_column(place, name, column.slice(0, table.num_rows)))
        case "drop":
            return as_file(table.drop_columns([name]))
        case "rename":
            return as_file(table.rename_columns([f"{item}x" if item == name else item for item in table.column_names]))
        case "rows":
            return as_file(table.slice(draw(st.integers(0, 3)), draw(st.integers(0, 5))))
    return as_file(pa.concat_tables([table, table]))


@st.composite
def stores(draw: st.DrawFn, sound: Files) -> Files:
    """A store with one file changed; `store.json` gives the new size or, as after a crash, the old one."""
    files = dict(sound)
    name = draw(st.sampled_from(sorted(files)))
    meta = json.loads(files["store.json"])
    if name == "store.json":
        files[name] = draw(changed(meta).map(to_json).flatmap(lambda text: st.one_of(st.just(text), torn(text))))
        return files
    files[name] = draw(st.one_of(torn(files[name]), odd_tables(files[name])))
    if draw(st.integers(0, 3)):
        meta["files"][name] = len(files[name])
        files["store.json"] = to_json(meta)
    return files


def test_stores(bench: Bench, tiny: Tiny, adapter: Path) -> None:
    sound = files_of(tiny.store_folder)
    search = ("search", "--dry-run", "--data", "store", "--tflops", 1, "--trials", 2)
    evaluate = ("evaluate", adapter, "--data", "store")
    bench.lay({f"store/{name}": content for name, content in sound.items()})
    bench.sound(*search)
    bench.sound(*evaluate)

    @bench.inputs(st.tuples(stores(sound), st.sampled_from([search, evaluate])), suite=30)
    def one(case: tuple[Files, tuple[object, ...]]) -> None:
        bench.lay({f"store/{name}": content for name, content in case[0].items()})
        bench.run(*case[1])


# Adapters


@st.composite
def odd_tensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with a tensor dropped, renamed, or of another shape, type or value."""
    tensors: dict[str, Any] = load(content)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    match draw(st.sampled_from(["drop", "rename", "shape", "type", "NaN", "zero", "large", "add"])):
        case "rename":
            tensors[f"{name}x"] = tensor
        case "shape":
            tensors[name] = np.zeros((*tensor.shape, 2), tensor.dtype)
        case "type":
            tensors[name] = tensor.astype(draw(st.sampled_from([np.float16, np.float64, np.int8, np.bool_])))
        case "NaN":
            tensors[name] = np.full_like(tensor, np.nan)
        case "zero":
            tensors[name] = np.zeros_like(tensor)
        case "large":
            tensors[name] = np.full_like(tensor, 3e38)
        case "add":
            tensors |= {name: tensor, "another": tensor}
    return save(tensors)


@st.composite
def adapters(draw: st.DrawFn, sound: Files) -> Files:
    """An exported adapter with one file changed or missing."""
    files = dict(sound)
    name = draw(st.sampled_from(sorted(files)))
    content = files.pop(name)
    if name.endswith(".safetensors"):
        new = draw(st.one_of(torn(content), odd_tensors(content)))
    elif name.endswith(".json"):
        text = draw(changed(json.loads(content)).map(to_json))
        new = draw(st.one_of(st.just(text), st.just(text), torn(text)))
    elif name.endswith(".yaml"):
        text = draw(changed(yaml.safe_load(content), tuple(ALL)).map(lambda value: to_json(value, ALL)))
        new = draw(st.one_of(st.just(text), st.just(text), torn(text)))
    else:
        new = draw(torn(content))
    return files if draw(st.integers(0, 9)) == 0 else files | {name: new}


def test_adapters(bench: Bench, tiny: Tiny, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training itself is not part of this."""
    monkeypatch.setattr(adapter_actions, "train_single", lambda *_: {"recall@10": 0.5})
    sound = files_of(adapter)
    evaluate, train = ("evaluate", "adapter"), ("train", "adapter/trial.yaml", "--out", "again")
    bench.lay({f"adapter/{name}": content for name, content in sound.items()})
    bench.sound(*evaluate)
    bench.sound(*train)

    @bench.inputs(st.tuples(adapters(sound), st.sampled_from([evaluate, evaluate, train])), suite=25)
    def one(case: tuple[Files, tuple[object, ...]]) -> None:
        bench.lay({f"adapter/{name}": content for name, content in case[0].items()})
        bench.run(*case[1])
