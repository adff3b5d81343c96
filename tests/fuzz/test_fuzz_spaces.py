"""Search spaces as people write them, as far as a search goes before it starts Ray."""

from __future__ import annotations

from typing import Any

from conftest import Tiny
from fuzzing import Bench
from generators import RAW, YAML_RAW, changed, maybe_torn, to_json
from hypothesis import strategies as st

ALL = RAW | YAML_RAW
SPACE: dict[str, Any] = {
    "name": "mine",
    "description": "A space of the test's.",
    "target_sets": {"pair": ["q_proj", "v_proj"], "all": ["q_proj", "k_proj", "v_proj", "fc1"]},
    "fixed": {"lora.alpha_ratio": 2.0, "head.kind": "linear"},
    "dimensions": {
        "lora.rank": {"int": [2, 8], "log": True},
        "lora.targets": {"choice": ["pair", "all", "q_proj"]},
        "lora.first_layer": {"choice": [0, -1]},
        "lora.dropout": {"float": [0.0, 0.2], "step": 0.05},
        "optim.lora_lr": {"float": [1.0e-4, 1.0e-2], "log": True},
        "loss.learn_temperature": {"choice": [True, False]},
        "loss.temperature": {"float": [0.03, 0.12], "when": {"loss.learn_temperature": False}},
    },
}


def test_spaces(bench: Bench, tiny: Tiny) -> None:
    search = ("search", "--dry-run", "--data", tiny.store_folder, "--tflops", 1, "--trials", 3, "--space", "mine.yaml")
    show = ("spaces", "show", "mine.yaml", "--encoder", tiny.encoder.source, "--text-dim", 8)
    bench.lay({"mine.yaml": to_json(SPACE)})
    bench.sound(*search)
    bench.sound(*show)

    @bench.inputs(
        st.tuples(
            changed(SPACE, tuple(ALL)).map(lambda value: to_json(value, ALL)).flatmap(lambda text: maybe_torn(text, 8)),
            st.sampled_from([search, show]),
        ),
        suite=40,
    )
    def one(case: tuple[bytes, tuple[object, ...]]) -> None:
        bench.lay({"mine.yaml": case[0]})
        bench.run(*case[1])
