"""Tables and figures from the stored results, beside the published figures."""

import csv
import io
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from slrprop.errors import SlrpropError
from slrprop.research.experiments import Experiment
from slrprop.research.paper.run import AUTO, ORIGINAL, Result, methods_of
from slrprop.research.tables import COLOURS, plus_minus, spread

METRICS = ("accuracy", "auc", "recall", "precision", "specificity")


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
