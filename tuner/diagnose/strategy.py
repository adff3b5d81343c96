"""Step 7: the part of the model that runs, the LoRA's modules, their cost, and the cost of other placements."""

from __future__ import annotations

from typing import Any

import numpy as np

from tuner.config import LoraSpec, TrialConfig
from tuner.data.store import Store
from tuner.diagnose.adapted import match
from tuner.diagnose.adapter_files import check_targets, check_weights, read_peft_config, read_shapes
from tuner.diagnose.findings import Step, duration, flops, gib
from tuner.diagnose.subject import TEXT_DIM, Subject
from tuner.diagnose.whole import WholeModel, lora_size, whole_model
from tuner.encoders.spec import EncoderSpec
from tuner.errors import AdapterError, PlacementError
from tuner.lora.cost import BYTES_TRAINED, Lengths, frozen_flops, training_flops
from tuner.lora.path import check_placement
from tuner.lora.placement import encoding_spec, resolve_placement, trainable_parameters
from tuner.train.batches import steps_per_epoch

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("fc1", "fc2")


def check_strategy(subject: Subject) -> Step:
    """Report everything that is known without loading the encoder, even if it could not be loaded."""
    step, spec = Step("strategy"), subject.spec
    if spec is None:
        step.skipped = "the encoder cannot be used (step 3)"
        return step
    whole = whole_model(spec)
    _path(step, spec, whole)
    fits = _placement(step, subject, spec)
    _files(step, subject, spec, whole)
    _comparison(step, spec, whole, subject.request.lora.rank)
    if fits:
        _cost(step, subject, spec)
    _space(step, subject, spec)
    return step


def _path(step: Step, spec: EncoderSpec, whole: WholeModel) -> None:
    strategy = "full_forward" if spec.tower_path is None else spec.path
    step.values |= {"strategy": strategy, "tower": spec.tower_path, "language_model": whole.language_model}
    if spec.tower_path is None:
        step.note(f"{spec.family} has no audio tower inside a larger model: the whole encoder runs (full_forward)")
    elif spec.path == "full_forward":
        step.ok(f"strategy full_forward: {spec.tower_path}, then {spec.language_model_path}, pooled over audio tokens")
    elif spec.tower_path == "":
        step.ok("strategy audio_tower: the folder has a tower only, and all of it runs")
    else:
        step.ok(f"strategy audio_tower: {spec.tower_path} runs alone; nothing else of the model is loaded")


def _placement(step: Step, subject: Subject, spec: EncoderSpec) -> bool:
    lora = subject.request.lora
    try:
        placement = resolve_placement(spec, lora)
        path = subject.paths.get(encoding_spec(spec, lora).fingerprint)
        if path is not None:
            check_placement(placement, path, "refuse")
    except PlacementError as error:
        step.error(str(error))
        return False
    parts = {stage.block_path: stage.part for stage in encoding_spec(spec, lora).stages}
    counts = {"tower": 0, "language_model": 0}
    sizes = dict(counts)
    for stage in placement.stages:
        part = next(part for block, part in parts.items() if stage.blocks[-1].startswith(block.partition("{}")[0]))
        features = [(linear.in_features, linear.out_features) for linear in stage.linears]
        counts[part] += 2 * len(stage.modules)
        sizes[part] += len(stage.blocks) * lora_size(features, lora.rank)
    step.values["lora"] = {part: {"tensors": counts[part], "parameters": sizes[part]} for part in counts}
    untraced = "" if path is not None else "; not traced, because there was no forward pass (step 5)"
    step.ok(
        f"rank {lora.rank} on {', '.join(placement.targets)}: {counts['tower']} LoRA tensors ({sizes['tower']:,} "
        f"parameters) in the tower, {counts['language_model']} ({sizes['language_model']:,}) outside it{untraced}"
    )
    return True


def _files(step: Step, subject: Subject, spec: EncoderSpec, whole: WholeModel) -> None:
    """Check the given adapter or PEFT configuration, if any."""
    request = subject.request
    origin = request.adapter or request.peft_config
    if origin is None:
        return
    try:
        config = read_peft_config(origin)
        held = read_shapes(request.adapter) if request.adapter is not None else None
        found = match(config, whole, held)
        check_targets(step, config, origin, found, whole, spec)
        if request.adapter is not None and held is not None:
            check_weights(step, request.adapter, held, found, whole)
    except AdapterError as error:
        step.error(str(error))


def _comparison(step: Step, spec: EncoderSpec, whole: WholeModel, rank: int) -> None:
    """Compare LoRA in the tower with LoRA on everything behind it, at the same rank."""
    tower = spec.tower_alone or spec
    rows = [_tower_row(tower, "tower: attention", ATTENTION, rank)]
    rows.append(_tower_row(tower, "tower: attention and MLP", ATTENTION + MLP, rank))
    behind = whole.behind_tower()
    if behind:
        name = "language model" if whole.language_model else "rest of the model"
        size = lora_size((whole.linears[module] for module in behind), rank)
        rows.append({"placement": f"{name}: all linear", "tensors": 2 * len(behind), "parameters": size})
        tensors, parameters = (rows[1][key] + rows[2][key] for key in ("tensors", "parameters"))
        rows.append({"placement": "both, all linear", "tensors": tensors, "parameters": parameters})
    for row in rows:
        row["ratio"] = round(row["parameters"] / rows[0]["parameters"], 2)
    step.values["comparison"] = {"rank": rank, "rows": rows}
    if behind:
        step.note(
            f"at rank {rank}, LoRA on the {name} has {rows[2]['parameters'] / 1e6:.2f}M parameters, "
            f"{rows[2]['ratio']:.1f} times the {rows[0]['parameters'] / 1e6:.2f}M of the tower's attention"
        )


def _tower_row(tower: EncoderSpec, name: str, targets: tuple[str, ...], rank: int) -> dict[str, Any]:
    placement = resolve_placement(tower, LoraSpec(rank=rank, targets=targets))
    return {"placement": name, "tensors": 2 * len(placement.modules), "parameters": placement.lora_parameters}


def _cost(step: Step, subject: Subject, spec: EncoderSpec) -> None:
    """Operations are counted; memory and time are those measured in step 6, in proportion to the tokens."""
    if subject.sample is None:
        step.note("the cost of a step is not estimated: there are no clips (step 4)")
        return
    request, source = subject.request, subject.sample.source
    train = _train_clips(request.store) if request.store is source else []
    frames = np.asarray(source.frames)[train or subject.sample.clips].tolist()
    batch, run = request.batch_size, encoding_spec(spec, request.lora)
    lengths, text_dim = Lengths.of(frames), request.store.text_dim if request.store is not None else TEXT_DIM
    tokens = batch * float(np.mean([run.sequence_length(length) for length in frames]))
    of_batch = batch / len(frames)
    step.values["step"] = {
        "batch_size": batch,
        "tokens": tokens,
        "forward_flops": frozen_flops(run, None, lengths) * of_batch,
        "step_flops": training_flops(spec, request.trial, lengths, text_dim) * of_batch,
    }
    values = step.values["step"]
    step.ok(
        f"a step of {batch} clips ({tokens:,.0f} tokens) needs {flops(values['step_flops'])} with cached frozen "
        f"states; a forward pass of the encoder needs {flops(values['forward_flops'])} (counted from the shapes)"
    )
    if subject.measured is None or subject.encoder is None:
        step.note("time and memory of a step are not estimated: no step was measured (step 6)")
        return
    share = tokens / subject.measured.tokens
    weights = sum(parameter.numel() * parameter.itemsize for parameter in subject.encoder.model.parameters())
    trained = BYTES_TRAINED * trainable_parameters(spec, request.trial, text_dim)
    memory, seconds = weights + trained + share * subject.measured.activation_bytes, share * subject.measured.seconds
    values |= {"seconds": seconds, "memory_bytes": memory}
    step.ok(
        f"such a step takes about {duration(seconds)} and {gib(memory)} in {subject.measured.setting} (step 6, scaled "
        f"to these tokens; weights {gib(weights)}, adapter with AdamW {gib(trained)}, the rest activations)"
    )


def _space(step: Step, subject: Subject, spec: EncoderSpec) -> None:
    """Whether every configuration fits, their number, and the time of a search."""
    request = subject.request
    if request.space is not None:
        text_dim = request.store.text_dim if request.store is not None else TEXT_DIM

        def fits(config: TrialConfig) -> None:
            path = subject.paths.get(encoding_spec(spec, config.lora).fingerprint)
            if config.lora is not None and path is not None:
                check_placement(resolve_placement(spec, config.lora), path, "refuse")
            trainable_parameters(spec, config, text_dim)

        try:
            request.space.validate_for(fits)
        except PlacementError as error:
            step.error(f"space {request.space.name}: {error}")
            return
        low, high = request.space.parameter_range(lambda config: trainable_parameters(spec, config, text_dim))
        size, grid = request.space.size(), request.space.size(countable_only=True)
        step.values["space"] = {"name": request.space.name, "configurations": size, "parameters": [low, high]}
        many = f"{grid:,} configurations" + ("" if size is not None else " times the continuous dimensions")
        step.ok(f"space {request.space.name}: {many}, {low:,} to {high:,} trainable parameters")
    seconds = step.values.get("step", {}).get("seconds")
    if seconds is None or request.store is None or not (train := _train_clips(request.store)):
        return
    steps = request.epochs * steps_per_epoch(len(train), request.batch_size)
    step.values["search"] = {"trials": request.trials, "steps": steps, "seconds": request.trials * steps * seconds}
    step.ok(
        f"{request.trials} trials of {request.epochs} epochs are {request.trials * steps} steps, about "
        f"{duration(request.trials * steps * seconds)} of training on this machine, less where frozen states are cached"
    )


def _train_clips(store: Store) -> list[int]:
    """The training clips of a store; none if its training split is empty, which step 2 reports."""
    return [clip for clip, split in enumerate(store.split_names) if split == "train"]
