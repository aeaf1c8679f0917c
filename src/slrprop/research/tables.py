"""What the studies' pages and figures share."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from slrprop.research.paper.results import spread


def paired(one: dict[int, float], other: dict[int, float]) -> str:
    """``one`` less ``other`` over the seeds that both have: the mean, and its 95 % interval by Student's t."""
    differences = [
        one[seed] - other[seed] for seed in sorted(one.keys() & other.keys()) if math.isfinite(one[seed] - other[seed])
    ]
    if not differences:
        return "-"
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"{mean:+.2f}"
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def times(before: Sequence[float], after: Sequence[float]) -> str:
    """How many times smaller, by the means; "-" without numbers."""
    known = [(a, b) for a, b in zip(before, after, strict=True) if math.isfinite(a + b) and b]
    return f"{statistics.mean(a for a, _ in known) / statistics.mean(b for _, b in known):.2f}" if known else "-"


def curve(axes: Any, values: Mapping[int, Sequence[float]], aside: float = 0.0, **style: Any) -> None:
    """Mean and deviation of the values at each place that has some, a little ``aside`` so that error bars stay readable."""
    points = [(x + aside, *spread(list(some))) for x, some in sorted(values.items()) if some]
    if points:
        x, y, error = zip(*points, strict=True)
        axes.errorbar(x, y, error, **{"marker": "o", "markersize": 4, "capsize": 2, "elinewidth": 0.7} | style)
