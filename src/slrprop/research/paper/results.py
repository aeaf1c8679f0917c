"""Tables and figures from the stored results, beside the published figures."""

import csv
import io
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from slrprop.errors import SlrpropError
from slrprop.files import holding, replacing
from slrprop.research.experiments import Experiment
from slrprop.research.paper.run import AUTO, ORIGINAL, methods_of
from slrprop.research.store import Result

METRICS = ("accuracy", "auc", "recall", "precision", "specificity")
COLOURS = ("#555555", "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#d55e00", "#999933", "#882255", "#000000")


def published() -> dict[tuple[str, str, int], dict[str, float]]:
    """The article's figures (SLR there is the cost criterion on both layers), by experiment, method and rank."""
    text = files("slrprop.research.paper").joinpath("published.csv").read_text()
    return {
        (row["experiment"], row["method"], int(row["rank"])): {
            metric: float(row[metric]) for metric in METRICS if row[metric]
        }
        for row in csv.DictReader(io.StringIO(text))
    }


def cells(results: Iterable[Result]) -> dict[tuple[str, int], list[Result]]:
    """Results of one experiment by method and rank."""
    grouped: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        grouped.setdefault((result.method, result.rank), []).append(result)
    return grouped


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


def table(experiment: Experiment, results: list[Result]) -> list[list[str]]:
    """Header and rows: mean and deviation of every metric, with the published value in brackets where there is one."""
    grouped, theirs = cells(results), published()
    lines = [["k", "method", "rate", "seeds", *METRICS]]
    for rank in (0, *experiment.ranks):
        for method in (ORIGINAL,) if rank == 0 else methods_of(experiment):
            found = grouped.get((method, rank), [])
            if not found:
                continue
            line = [str(rank or ""), method, f"{found[0].compression_rate:.4f}", str(len(found))]
            for metric in METRICS:
                ours = plus_minus([getattr(result, metric) for result in found])
                other = theirs.get((experiment.name, method, rank), {}).get(metric)
                line.append(ours + ("" if other is None else f" [{other:.2f}]"))
            lines.append(line)
    if len(lines) == 1:
        raise SlrpropError(
            f"there are no results of {experiment.name} yet; compute them with: slrprop paper run {experiment.name}"
        )
    return lines


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


def figure(experiment: Experiment, results: list[Result], title: str) -> Any:
    """Accuracy against compression rate of the layer before the FRL, mean and deviation over seeds."""
    from matplotlib.figure import Figure

    grouped, theirs = cells(results), published()
    canvas = Figure(figsize=(7.5, 5), layout="constrained")
    axes = canvas.add_subplot()
    rates: dict[int, float] = {}
    for index, (colour, method) in enumerate(zip(COLOURS, methods_of(experiment), strict=False)):
        points = []
        apart = 1 + 0.012 * (index - 3)  # so that error bars at one rate stay readable
        for rank in experiment.ranks:
            if found := grouped.get((method, rank)):
                slr = rates.get(rank) if method.startswith(AUTO) else None
                rate = slr or found[0].compression_rate
                points.append((apart * rate, *spread([result.accuracy for result in found])))
                if method.startswith("slr"):
                    rates[rank] = found[0].compression_rate
        if points:
            x, y, error = zip(*points, strict=True)
            axes.errorbar(
                x,
                y,
                error,
                color=colour,
                label=method,
                marker="o",
                markersize=4,
                capsize=2,
                linewidth=1.4,
                elinewidth=0.7,
            )
    for method, colour, marker in (("slr cost", COLOURS[3], "x"), ("slrprop", COLOURS[6], "+")):
        given = [
            (rates[rank], theirs[experiment.name, method, rank]["accuracy"])
            for rank in experiment.ranks
            if rank in rates and (experiment.name, method, rank) in theirs
        ]
        if given:
            xs, ys = zip(*given, strict=True)
            axes.scatter(xs, ys, s=55, color=colour, marker=marker, label=f"{method}, published", zorder=3)
    if originals := grouped.get((ORIGINAL, 0)):
        mean, _ = spread([result.accuracy for result in originals])
        axes.axhline(mean, color="black", linewidth=0.8, linestyle=":", label=f"original, {mean:.2f} %")
    axes.set_xscale("log")
    axes.set_xticks(list(rates.values()), [f"{rate:.4g}\nk = {rank}" for rank, rate in rates.items()])
    axes.minorticks_off()
    axes.set_xlabel(f"compression rate of {experiment.layers[0]}: stored numbers / original numbers")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return canvas
