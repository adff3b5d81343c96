"""What a study found, in words: what LoRA is worth here, and the smallest adapter that is as good as the best."""

from __future__ import annotations

from typing import Any

from tuner.report.progress import BASELINE
from tuner.report.run import Run, TrialSummary, metric_of


def headline(run: Run) -> list[str]:
    """Two or three sentences; on the test gallery when the front is confirmed, else on validation so far.

    The best point is chosen on validation; its test metrics only say what it is worth.
    """
    return _so_far(run) if run.front is None else _confirmed(run, run.front)


def interval_of(point: dict[str, Any], metric: str) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of a test metric, when there is one."""
    found = point.get("test", {}).get("intervals", {}).get(metric)
    return (float(found[0]), float(found[1])) if found else None


def difference_of(point: dict[str, Any], metric: str) -> tuple[float, tuple[float, float]] | None:
    """Test metric minus that of the baseline, with the interval of the paired difference."""
    found = point.get("test_vs_baseline", {}).get(metric)
    return (float(found["difference"]), (float(found["interval"][0]), float(found["interval"][1]))) if found else None


def _so_far(run: Run) -> list[str]:
    ended = sum(trial.state != "running" for trial in run.trials)
    progress = f"The search has ended {ended} of the {len(run.trials)} trials it has started."
    finished = [trial for trial in run.measured if trial.state == "complete"]
    if not finished:
        return ["No trial has finished yet.", progress]
    best = _better(run, [trial for trial in finished if trial.value is not None])
    sentences = [
        f"Best validation {run.metric} so far: {best.value:.3f} ({best.trial}, {best.parameters:,} parameters)."
    ]
    baseline = next((trial for trial in finished if trial.origin == BASELINE), None)
    if baseline is not None and baseline.value is not None and best.value is not None and best is not baseline:
        sentences.append(
            f"That is {best.value - baseline.value:+.3f} over the projection alone ({baseline.value:.3f})."
        )
    return [*sentences, progress, "The test gallery is read once, when the search has ended."]


def _confirmed(run: Run, front: dict[str, Any]) -> list[str]:
    metric, sign = run.metric, 1 if run.direction == "maximize" else -1
    points = [point for point in front["points"] if metric_of(point["validation"], metric) is not None]
    candidates = [point for point in points if point["on_front"]]
    if not candidates:
        return ["No trial finished, so there is no front."]
    best = max(candidates, key=lambda point: sign * (metric_of(point["validation"], metric) or 0.0))
    if best["trial"] == front["baseline"]:
        return [f"No LoRA configuration was better than the projection alone in {metric} on validation."]
    return [*_worth(best, metric, sign), *_smallest(best, points, metric, sign)]


def _worth(best: dict[str, Any], metric: str, sign: int) -> list[str]:
    size = f"{best['lora_parameters']:,} LoRA parameters ({best['trainable_parameters']:,} trainable in all)"
    worth = difference_of(best, metric)
    if worth is None:
        value = metric_of(best.get("test", {}), metric)
        reached = "was not measured" if value is None else f"is {value:.3f}"
        return [f"The test {metric} of the best point, {best['trial']} at {size}, {reached}."]
    difference, (low, high) = worth
    sentence = (
        f"LoRA is worth {difference:+.3f} {metric} [{low:+.3f}, {high:+.3f}] over the projection alone, at {size}."
    )
    if low <= 0 <= high:
        return [sentence, "The interval contains zero: this test gallery does not tell the two apart."]
    return (
        [sentence]
        if sign * difference > 0
        else [sentence, "That is a loss: what validation chose did not hold on test."]
    )


def _smallest(best: dict[str, Any], points: list[dict[str, Any]], metric: str, sign: int) -> list[str]:
    interval = interval_of(best, metric)
    if interval is None:
        return []
    worst = interval[0] if sign > 0 else interval[1]
    tested = [(point, metric_of(point.get("test", {}), metric)) for point in points]
    close = [point for point, value in tested if value is not None and sign * value >= sign * worst]
    smallest = min(close, key=lambda point: point["trainable_parameters"], default=best)
    if smallest["trainable_parameters"] >= best["trainable_parameters"]:
        return [f"No smaller point reaches the interval of the best, [{interval[0]:.3f}, {interval[1]:.3f}]."]
    share = best["trainable_parameters"] / smallest["trainable_parameters"]
    return [
        f"The smallest point inside the interval of the best, [{interval[0]:.3f}, {interval[1]:.3f}], is "
        f"{smallest['trial']} with {smallest['trainable_parameters']:,} trainable parameters, {share:.1f}x fewer."
    ]


def _better(run: Run, trials: list[TrialSummary]) -> TrialSummary:
    sign = 1 if run.direction == "maximize" else -1
    return max(trials, key=lambda trial: sign * (trial.value or 0.0))
