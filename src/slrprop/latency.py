"""Latency of ONNX files in ONNX Runtime, measured against each other in one run."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import numpy as np

from slrprop.export import session
from slrprop.files import scratch
from slrprop.forms import Form
from slrprop.network.onnx.rewrite import layer_file
from slrprop.operators import Convolution, Operator

FINE = 1e-6  # seconds


def latencies(
    files: Mapping[str, str | Path],
    inputs: Sequence[np.ndarray] | Mapping[str, np.ndarray],
    repetitions: int = 50,
    threads: int = 1,
) -> dict[str, float]:
    """Median seconds of one run of each model, interleaved in ever another order so that drift hits all alike.

    On one thread its own time is counted where the system tells it finely: what other programs take of the processor is not.

    Args:
        inputs: arrays in the order of the models' inputs, or by their names.
    """
    own = threads == 1 and time.get_clock_info("thread_time").resolution < FINE
    clock, random = time.thread_time if own else time.perf_counter, Random(0)
    runtimes = {name: session(path, threads) for name, path in files.items()}
    feeds = {
        name: inputs
        if isinstance(inputs, Mapping)
        else dict(zip((slot.name for slot in runtime.get_inputs()), inputs, strict=True))
        for name, runtime in runtimes.items()
    }
    times: dict[str, list[float]] = {name: [] for name in files}
    for repetition in range(repetitions + 3):
        for name in random.sample(sorted(runtimes), len(runtimes)):
            start = clock()
            runtimes[name].run(None, feeds[name])
            if repetition >= 3:  # the first runs warm up
                times[name].append(clock() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def layer_latencies(
    forms: Mapping[str, Form], operator: Operator, positions: int, integers: bool = False, repetitions: int = 20
) -> dict[str, float]:
    """Median seconds of one sample through one layer in each of these forms, interleaved.

    Args:
        positions: products for the sample: rows of tokens, or a convolution's map, which is made as square as it can be.
        integers: see :func:`slrprop.network.onnx.rewrite.rewritten`.
    """
    m = next(iter(forms.values())).shape[0]
    shape: tuple[int, ...] = (1, positions, m) if positions > 1 else (1, m)
    if isinstance(operator, Convolution):
        shape = (1, m // operator.unit * operator.groups, *operator.read(_square(positions, len(operator.kernel))))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with scratch() as folder:
        files = {name: folder / f"{index}.onnx" for index, name in enumerate(forms)}
        for name, path in files.items():
            layer_file(forms[name], operator, shape, integers).write(path)
        return latencies(files, [x], repetitions)


def _square(size: int, axes: int) -> tuple[int, ...]:
    """Sides of a map of so many places, each as near to the others as divisors are."""
    if axes == 1:
        return (size,)
    side = max(part for part in range(1, 1 + math.isqrt(size)) if size % part == 0) if axes == 2 else 1
    return (side, *_square(size // side, axes - 1))
