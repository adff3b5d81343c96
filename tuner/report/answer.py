"""The result of a study in words: the gain of LoRA, and the smallest adapter that is as good as the best."""

from __future__ import annotations

from tuner.study.points import ConfirmedFront, Point
from tuner.study.study import Study


def headline(study: Study) -> list[str]:
    """Two or three sentences; on the test gallery if the front is confirmed, else on validation so far.

    The best point is chosen on validation; test metrics are only reported.
    """
    return _so_far(study) if study.front is None else _confirmed(study.front, study.metric.name)


def best_point(points: list[Point], metric: str) -> Point:
    """The best of some points on validation: by the expected value, if all have one."""

    def worth(point: Point) -> float:
        if all(each.belief for each in points) and point.belief is not None:
            return point.belief.expected.get(metric, 0.0)
        return point.validation.value(metric) or 0.0

    return max(points, key=worth)


def _so_far(study: Study) -> list[str]:
    ended = sum(trial.state != "running" for trial in study.trials)
    progress = f"{ended} of {len(study.trials)} started trials have ended."
    metric = study.metric.name
    finished = [trial for trial in study.measured if trial.state == "complete"]
    if not finished:
        return ["No trial has finished yet.", progress]
    best = max(finished, key=lambda trial: trial.value(metric))
    sentences = [
        f"Best validation {metric} so far: {best.value(metric):.3f} ({best.trial}, {best.parameters:,} parameters)."
    ]
    baseline = study.baseline
    if baseline is not None and baseline in finished and best is not baseline:
        gain, alone = best.value(metric) - baseline.value(metric), baseline.value(metric)
        sentences.append(f"That is {gain:+.3f} over the projection alone ({alone:.3f}).")
    return [*sentences, progress, "The test gallery is read once, after the last trial."]


def _confirmed(front: ConfirmedFront, metric: str) -> list[str]:
    points = [point for point in front.points if point.validation.value(metric) is not None]
    candidates = [point for point in points if point.on_front]
    if not candidates:
        return ["No trial finished, so there is no front."]
    best = best_point(candidates, metric)
    if best.trial == front.baseline:
        return [f"No LoRA configuration was better than the projection alone in {metric} on validation."]
    return [*_worth(best, metric), *_smallest(best, points, metric)]


def _worth(best: Point, metric: str) -> list[str]:
    size = f"{best.lora_parameters:,} LoRA parameters ({best.trainable_parameters:,} trainable in all)"
    worth = best.test_vs_baseline.get(metric)
    if worth is None:
        value = best.test.value(metric)
        reached = "was not measured" if value is None else f"is {value:.3f}"
        return [f"The test {metric} of the best point, {best.trial} at {size}, {reached}."]
    low, high = worth.interval
    gain = f"{worth.difference:+.3f} {metric} [{low:+.3f}, {high:+.3f}]"
    sentence = f"LoRA is worth {gain} over the projection alone, at {size}."
    if low <= 0 <= high:
        return [sentence, "The interval contains zero: the difference is not significant on this test gallery."]
    if worth.difference > 0:
        return [sentence]
    return [sentence, "That is a loss: the point that was best on validation is worse on test."]


def _smallest(best: Point, points: list[Point], metric: str) -> list[str]:
    interval = best.interval(metric)
    if interval is None:
        return []
    low, high = interval
    close = [point for point in points if (value := point.test.value(metric)) is not None and value >= low]
    smallest = min(close, key=lambda point: point.trainable_parameters, default=best)
    if smallest.trainable_parameters >= best.trainable_parameters:
        return [f"No smaller point reaches the interval of the best, [{low:.3f}, {high:.3f}]."]
    share = best.trainable_parameters / smallest.trainable_parameters
    return [
        f"The smallest point inside the interval of the best, [{low:.3f}, {high:.3f}], is "
        f"{smallest.trial} with {smallest.trainable_parameters:,} trainable parameters, {share:.1f}x fewer."
    ]
