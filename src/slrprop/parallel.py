"""Work in independent parts: in this process, in processes of this machine, or on an existing Ray cluster."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import BrokenProcessPool

from slrprop.checks import need_extra, require_count
from slrprop.errors import SlrpropError, first_line
from slrprop.files import raising_on_signals, scratch
from slrprop.progress import Progress

RETRIES = 10  # times that a task runs again whose machine was lost

Task = TypeVar("Task")
Result = TypeVar("Result")

_shared: dict[str, tuple[Any, ...]] = {}  # what this worker process was given, by the call it was given for


def each(
    function: Callable[..., Result],
    tasks: Iterable[Task],
    shared: tuple[Any, ...] = (),
    workers: int = 1,
    cluster: str | None = None,
) -> Iterator[tuple[Task, Result]]:
    """Yield every task with ``function(task, *shared)``, as they finish; one after the other in this process by default.

    Workers compute with one thread each and show no progress. Whoever stops listening stops the work.

    Args:
        function: importable where the workers are.
        shared: sent to every worker process once, not with every task; changes to it stay in that process.
        workers: processes on this machine.
        cluster: a Ray cluster instead: its address (``ray://host:10001``), or ``auto``, the one that this machine is part of.
            It runs as many tasks at a time as it has CPUs; tasks of a lost machine run again on another.

    Raises:
        SlrpropError: the number of workers is none; Ray is not installed; no cluster answers; a worker died.
        Exception: what a task raised, as it was raised.
    """
    require_count("workers", workers, 1)
    tasks = list(tasks)
    if cluster is not None:
        if cluster != "auto" and not cluster.startswith("ray://"):
            raise SlrpropError(f"cluster must be 'auto' or ray://HOST:PORT, got '{cluster}'")
        return _on_cluster(function, tasks, shared, cluster) if tasks else iter(())
    if workers == 1 or len(tasks) < 2:
        return ((task, function(task, *shared)) for task in tasks)
    return _in_processes(function, tasks, shared, min(workers, len(tasks)))


def _start(call: str, shared: tuple[Any, ...], folder: str | None = None) -> None:
    tempfile.tempdir = folder  # what is temporary goes with the process that called
    _shared.clear()
    _shared[call] = shared
    torch.set_num_threads(1)
    Progress.quiet = True  # bars of several processes would run into each other


def _numbered(function: Callable[..., Result], call: str, index: int, task: Any) -> tuple[int, Result]:
    with raising_on_signals(lambda number: SlrpropError(f"a worker process was ended by signal {number}")):
        return index, function(task, *_shared[call])


def _in_processes(
    function: Callable[..., Result], tasks: list[Task], shared: tuple[Any, ...], workers: int
) -> Iterator[tuple[Task, Result]]:
    call = uuid.uuid4().hex
    try:
        with scratch() as folder:
            pool = Parallel(
                workers, return_as="generator_unordered", batch_size=1, max_nbytes=None, inner_max_num_threads=1,
                initializer=_start, initargs=(call, shared, str(folder)),
            )  # fmt: skip
            jobs = (delayed(_numbered)(function, call, index, task) for index, task in enumerate(tasks))
            with contextlib.closing(pool(jobs)) as found:  # which ends the workers
                for index, result in found:
                    yield tasks[index], result
    except BrokenProcessPool as error:
        raise SlrpropError(
            f"one of {workers} worker processes died ({first_line(error)}); it may have run out of memory: ask for fewer"
        ) from error


def _remote(function: Callable[..., Result], call: str, shared: list[Any], task: Any) -> Result:
    if call not in _shared:
        import ray

        _start(call, tuple(ray.get(shared)))
    return function(task, *_shared[call])


def _on_cluster(
    function: Callable[..., Result], tasks: list[Task], shared: tuple[Any, ...], cluster: str
) -> Iterator[tuple[Task, Result]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = need_extra("ray", "ray")
    joined = not ray.is_initialized()
    try:
        if joined:
            ray.init(cluster, log_to_driver=False, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError, ImportError, AssertionError) as error:
        raise SlrpropError(
            f"no Ray cluster answers at '{cluster}' ({first_line(error)}); start one with: ray start --head"
        ) from None
    pending: dict[Any, Task] = {}
    try:
        call, sent = uuid.uuid4().hex, [ray.put(value) for value in shared]
        remote = ray.remote(max_retries=RETRIES)(_remote)
        pending = {remote.remote(function, call, sent, task): task for task in tasks}
        while pending:
            (done,), _ = ray.wait(list(pending))
            task = pending.pop(done)
            yield task, ray.get(done)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Exception) and not isinstance(cause, ray.exceptions.RayError):
            raise cause from None
        raise SlrpropError(
            f"the Ray cluster '{cluster}' lost a task for good ({first_line(error)}); are all its machines alive, with "
            "the same Python, Ray and slrprop on them?"
        ) from None
    finally:
        if joined:  # which ends its tasks
            ray.shutdown()
        else:
            for left in pending:
                ray.cancel(left)
