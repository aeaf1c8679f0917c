"""What the pages and figures of sweep, comparison and studies share."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from scipy import stats

from slrprop.files import holding, replacing

COLOURS = ("#555555", "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#d55e00", "#999933", "#882255", "#000000")


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds, of the values that are defined."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan, math.nan
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def plus_minus(values: list[float]) -> str:
    """Mean ± standard deviation of the values that are defined, if there is more than one; "-" if there is none."""
    mean, deviation = spread(values)
    return "-" if math.isnan(mean) else f"{mean:.2f} ± {deviation:.2f}" if len(values) > 1 else f"{mean:.2f}"


def markdown(lines: list[list[str]]) -> str:
    """The table as Markdown."""
    header, *rows = lines
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows)) + "\n"


def write_csv(results: list[Any], path: Path) -> None:
    """All rows (of one dataclass, at least one) as CSV."""
    names = [field.name for field in fields(results[0])]
    with replacing(path, holding(",".join(names))) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for result in results:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in asdict(result).items()}
            )


def save_figure(drawn: Any, path: Path) -> None:
    """Write a figure as PNG or SVG, by the name's end; of the same rows the same file."""
    import matplotlib

    kind = path.suffix[1:]
    with replacing(path, holding("Matplotlib")) as part, matplotlib.rc_context({"svg.hashsalt": path.stem}):
        drawn.savefig(part, dpi=130, format=kind, metadata={"Date": None} if kind == "svg" else None)


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
