"""The prepare pipeline on Ray Data: on the caller's cluster, or on a quiet local one for as long as it takes."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pyarrow as pa

from tuner import errors
from tuner.data.worker import RESULT_SCHEMA, FeatureWorker
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.text_facts import TextSpec
from tuner.errors import TunerError
from tuner.loopback import embedded_ray, environment
from tuner.ray_cluster import cluster_address, joined_ray
from tuner.ray_start import held_stderr

# An actor pays for its start (torch, 7 s on one core) after about this many batches.
BATCHES_PER_ACTOR = 16
# Results wait in the object store for the driver: two full batches a worker. Left alone, Ray takes 30 % of memory.
OBJECT_STORE_BYTES_PER_CPU = 128 << 20
# The core worker writes errors to stderr past Ray's logging level, a harmless one about constructor arguments for each
# actor pool. What matters arrives as a Python exception.
_QUIET = {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_USAGE_STATS_ENABLED": "0"}


def run_on_ray(work: Sequence[pa.Table], spec: EncoderSpec, text: TextSpec) -> Generator[pa.Table, None, None]:
    """Results of all batches of work, in any order, as they are ready.

    Raises:
        TunerError: what a worker raised about its input.
    """
    with ray_cluster() as cpus:
        import ray.data

        with _quiet_data():
            actors = max(1, min(cpus, math.ceil(len(work) / BATCHES_PER_ACTOR)))
            results = ray.data.from_arrow(list(work)).map_batches(
                RayFeatureWorker,
                fn_constructor_args=(spec, text),
                batch_size=None,
                batch_format="pyarrow",
                zero_copy_batch=True,
                num_cpus=1,
                compute=ray.data.ActorPoolStrategy(size=actors),
            )
            stream: Any = iter(results.iter_batches(batch_size=None, batch_format="pyarrow"))
            # Closed while Ray still runs, however this ends: closing reports to one of Ray's actors.
            with closing(stream) as tables:
                for table in tables:
                    _raise_failure(table)
                    yield table


class RayFeatureWorker(FeatureWorker):
    """A worker whose errors for the user travel as a row: Ray Data wraps exceptions and pickling loses their cause."""

    def __call__(self, work: pa.Table) -> pa.Table:
        try:
            return super().__call__(work)
        except TunerError as error:
            failure = {"index": -1, "kind": "failure", "reason": type(error).__name__, "detail": str(error)}
            return pa.Table.from_pylist([failure], schema=RESULT_SCHEMA)


def _raise_failure(table: pa.Table) -> None:
    kinds = table.column("kind").to_pylist()
    if "failure" in kinds:
        row = kinds.index("failure")
        error: type[TunerError] = getattr(errors, str(table.column("reason")[row]))
        raise error(str(table.column("detail")[row]))


@contextmanager
def ray_cluster() -> Iterator[int]:
    """Ray as the caller started it, or the cluster of `RAY_ADDRESS`, or a local one that ends with the context.

    Yields:
        The number of CPUs of the cluster.

    Raises:
        ClusterError: Ray does not start, or the cluster cannot be joined.
    """
    import ray

    with ExitStack() as stack:
        if not ray.is_initialized():
            quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
            if address := cluster_address():
                stack.enter_context(joined_ray(address, **quiet))
            else:
                # The core worker announces that it follows RAY_BACKEND_LOG_LEVEL before it follows it.
                with environment(_QUIET), held_stderr("failure"):
                    store_bytes = OBJECT_STORE_BYTES_PER_CPU * (os.cpu_count() or 1)
                    local = embedded_ray(include_dashboard=False, object_store_memory=store_bytes, **quiet)
                    stack.enter_context(local)
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield int(resources.get("CPU", 1))


@contextmanager
def _quiet_data() -> Iterator[None]:
    """Ray Data without its own progress bars and log lines: the caller shows one bar over everything."""
    import ray.data

    context = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    before = (context.enable_progress_bars, logger.level)
    context.enable_progress_bars = False
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        context.enable_progress_bars = before[0]
        logger.setLevel(before[1])
