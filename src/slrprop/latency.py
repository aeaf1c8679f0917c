"""Latency of ONNX files in ONNX Runtime, measured against each other in one run."""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from slrprop.export import session


def latencies(
    files: Mapping[str, str | Path],
    inputs: Sequence[np.ndarray] | Mapping[str, np.ndarray],
    repetitions: int = 50,
    threads: int = 1,
) -> dict[str, float]:
    """Median seconds of one run of each model, interleaved so that drift hits all alike.

    Args:
        inputs: arrays in the order of the models' inputs, or by their names.
    """
    runtimes = {name: session(path, threads) for name, path in files.items()}
    feeds = {
        name: inputs
        if isinstance(inputs, Mapping)
        else dict(zip((slot.name for slot in runtime.get_inputs()), inputs, strict=True))
        for name, runtime in runtimes.items()
    }
    times: dict[str, list[float]] = {name: [] for name in files}
    for repetition in range(repetitions + 3):
        for name, runtime in runtimes.items():
            start = time.perf_counter()
            runtime.run(None, feeds[name])
            if repetition >= 3:  # the first runs warm up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}
