"""What the Grafana dashboard of a search shows: titles, PromQL and units, line by line."""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = 24  # of Grafana's grid
STUDY = 'study=~"$study"'
# Grafana makes it wide enough to hold several scrapes.
RATE = "[$__rate_interval]"
# Ray's agent measures GPUs by node; who trains on which is joined in.
GPU_JOIN = (
    f"* on (ip, GpuIndex) group_left (lane, rank) max by (ip, GpuIndex, lane, rank) (ray_tuner_lane_up{{{STUDY}}})"
)


@dataclass(frozen=True)
class Query:
    """One PromQL expression and how its curves are called."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel: `kind` is Grafana's (`stat`, `timeseries`, `table`), `unit` one of Grafana's unit ids."""

    title: str
    description: str
    kind: str
    unit: str
    queries: tuple[Query, ...]
    width: int = 12
    height: int = 8
    stacked: bool = False


def _sum(metric: str, by: str, selector: str = STUDY) -> str:
    return f"sum by ({by}) ({metric}{{{selector}}})"


# Each line of the grid, from the top; the widths of a line add up to 24.
LINES: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Study",
        (
            Panel(
                "Trials",
                "Trials by state. A failed trial says why in `tuner status`.",
                "stat",
                "short",
                (Query(_sum("ray_tuner_trials", "state"), "{{state}}"),),
                width=8,
                height=5,
            ),
            Panel(
                "Epochs",
                "Share of the planned epochs that are trained; trials that end early leave theirs out.",
                "stat",
                "percentunit",
                (
                    Query(
                        f"{_sum('ray_tuner_epochs', 'study')} / {_sum('ray_tuner_epochs_planned', 'study')}",
                        "{{study}}",
                    ),
                ),
                width=4,
                height=5,
            ),
            Panel(
                "Best recall",
                "Best validation recall of any epoch so far.",
                "stat",
                "percentunit",
                (Query(f"max by (study, metric) (ray_tuner_best_recall{{{STUDY}}})", "{{study}} {{metric}}"),),
                width=4,
                height=5,
            ),
            Panel(
                "Front points",
                "Complete trials that no other one beats in recall and trainable parameters.",
                "stat",
                "short",
                (Query(_sum("ray_tuner_front_points", "study"), "{{study}}"),),
                width=4,
                height=5,
            ),
            Panel(
                "Workers up",
                "Workers of lanes that are there now.",
                "stat",
                "short",
                (Query(f"count by (study) (ray_tuner_lane_up{{{STUDY}}})", "{{study}}"),),
                width=4,
                height=5,
            ),
        ),
    ),
    (
        "Progress",
        (
            Panel(
                "Trials by state",
                "Running, complete, failed and stopped early, over time.",
                "timeseries",
                "short",
                (Query(_sum("ray_tuner_trials", "study, state"), "{{study}} {{state}}"),),
                stacked=True,
            ),
            Panel(
                "Front hypervolume",
                "What the front dominates: recall times decades of trainable parameters, measured from no recall at "
                "1e9 parameters. It never falls while a study goes on.",
                "timeseries",
                "none",
                (Query(f"max by (study) (ray_tuner_front_hypervolume{{{STUDY}}})", "{{study}}"),),
            ),
            Panel(
                "Recall of running trials",
                "Validation recall after each epoch, by slot: as many as run at once. A gap is a change of trial.",
                "timeseries",
                "percentunit",
                (Query(f"ray_tuner_trial_recall{{{STUDY}}}", "{{study}} slot {{slot}}"),),
            ),
            Panel(
                "Loss of running trials",
                "Mean training loss of each epoch, by slot.",
                "timeseries",
                "none",
                (Query(f"ray_tuner_trial_loss{{{STUDY}}}", "{{study}} slot {{slot}}"),),
            ),
            Panel(
                "Trial in each slot",
                "Number of the trial that a slot shows: 7 is t0007.",
                "timeseries",
                "none",
                (Query(f"ray_tuner_trial_number{{{STUDY}}}", "{{study}} slot {{slot}}"),),
            ),
            Panel(
                "Epochs an hour",
                "Epochs trained by all lanes of a study. Workers of one lane train the same epoch.",
                "timeseries",
                "none",
                (
                    Query(
                        f'3600 * sum by (study) (rate(ray_tuner_lane_epochs_total{{{STUDY}, rank="0"}}{RATE}))',
                        "{{study}}",
                    ),
                ),
            ),
        ),
    ),
    (
        "Lanes",
        (
            Panel(
                "Clips per second",
                "Training speed in the last epoch of a trial, by lane.",
                "timeseries",
                "none",
                (Query(f'ray_tuner_clips_per_second{{{STUDY}, rank="0"}}', "{{lane}}"),),
            ),
            Panel(
                "Seconds of an epoch",
                "Training and validation time of the last epoch, by lane.",
                "timeseries",
                "s",
                (
                    Query(f'ray_tuner_epoch_seconds{{{STUDY}, rank="0"}}', "{{lane}} training"),
                    Query(f'ray_tuner_validation_seconds{{{STUDY}, rank="0"}}', "{{lane}} validating"),
                ),
            ),
            Panel(
                "Where time goes",
                "Workers busy with each activity; waiting is the share that a larger pack or more trials would use.",
                "timeseries",
                "none",
                (Query(f"sum by (activity) (rate(ray_tuner_lane_seconds_total{{{STUDY}}}{RATE}))", "{{activity}}"),),
                stacked=True,
            ),
            Panel(
                "Memory of workers",
                "Resident memory of each lane's workers.",
                "timeseries",
                "bytes",
                (Query(f"ray_tuner_lane_memory_bytes{{{STUDY}}}", "{{lane}} {{rank}}"),),
            ),
            Panel(
                "Prefix cache: read",
                "Frozen states that were read instead of computed.",
                "timeseries",
                "Bps",
                (Query(f"sum by (lane) (rate(ray_tuner_prefix_read_bytes_total{{{STUDY}}}{RATE}))", "{{lane}}"),),
            ),
            Panel(
                "Prefix cache: files",
                "Caches in use by depth of the first adapted block: found on disk, or made by the lane itself.",
                "timeseries",
                "short",
                (Query(_sum("ray_tuner_prefix_files", "lane, origin"), "{{lane}} {{origin}}"),),
                width=6,
            ),
            Panel(
                "Prefix cache: size",
                "Bytes of the caches in use on the local disk.",
                "timeseries",
                "bytes",
                (Query(_sum("ray_tuner_prefix_file_bytes", "lane"), "{{lane}}"),),
                width=6,
            ),
        ),
    ),
    (
        "GPUs (empty where lanes train on CPUs)",
        (
            Panel(
                "GPU use",
                "Share of time that a kernel ran, as Ray measures it, of the GPUs that lanes have.",
                "timeseries",
                "percent",
                (Query(f"ray_node_gpus_utilization {GPU_JOIN}", "{{lane}} {{rank}}"),),
            ),
            Panel(
                "GPU memory",
                "Tensors, their peak, and what torch holds for them, by worker.",
                "timeseries",
                "bytes",
                (Query(f"ray_tuner_lane_gpu_memory_bytes{{{STUDY}}}", "{{lane}} {{rank}} {{kind}}"),),
            ),
        ),
    ),
    (
        "Logs",
        (
            Panel(
                "Workers",
                "Where each worker is; its actor opens its log in Ray's dashboard, a line for each trial and epoch.",
                "table",
                "none",
                (Query(f"ray_tuner_lane_up{{{STUDY}}}", ""),),
                width=COLUMNS,
            ),
        ),
    ),
)
