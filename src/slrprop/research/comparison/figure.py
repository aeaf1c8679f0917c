"""The frontier as a figure: accuracy lost against stored bytes."""

import statistics
from itertools import pairwise, product
from typing import Any

import numpy as np

from slrprop.research.comparison.contenders import NARROWER
from slrprop.research.comparison.results import Results, amount

# Okabe and Ito's colours, safe for the colour-blind; markers and lines tell them apart as well
SHOWN = {
    "SVD": ("#555555", "o", "-"),
    "SLR cost": ("#cc79a7", "s", "-"),
    "SLRProp": ("#d55e00", "D", "-"),
    "SVD, 4 bits": ("#56b4e9", "v", "-"),
    "Taylor, 4 bits": ("#e69f00", "P", "-"),
    "nested, 4 bits": ("#009e73", "^", "-"),
    "auto, calibrated": ("#0072b2", "o", "-"),
    "auto, tuned": ("#000000", "o", "-"),
    NARROWER: ("#555555", "x", "--"),
}
TICKS = (-10, -3, -1, -0.3, -0.1, 0, 0.1, 0.3, 1, 3, 10, 30, 90)
AROUND = [(0.0, 1.0), (0.0, -1.0), (1.0, 0.0), (-1.0, 0.0), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8)]


def figure(results: Results) -> Any:
    """All contenders' lines in grey, some in colour with their names beside them; returns a matplotlib figure."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9, 6), layout="constrained")
    axes = canvas.add_subplot()
    lines: dict[str, Any] = {}
    for name in results.names:
        sizes = [size for size in results.sizes if results.cell(name, size)]
        x = [statistics.mean(row.bytes for row in results.cell(name, size).values()) for size in sizes]
        y = [results.lost(name, size) for size in sizes]
        colour, marker, style = SHOWN.get(name, ("#cccccc", "", "-"))
        shown = name in SHOWN
        lines[name] = axes.plot(
            x, y, color=colour, marker=marker, linestyle=style, markersize=5, linewidth=1.8 if shown else 0.8,
            zorder=3 if shown else 1,
        )[0]  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    apart: list[int] = []  # sizes that are not too near each other to be written
    for size in results.sizes:
        if not apart or size > 1.25 * apart[-1]:
            apart.append(size)
    axes.set_xticks(apart, [amount(size) for size in apart], fontsize=9)
    axes.minorticks_off()
    axes.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    lost = [results.lost(*cell) for cell in results.cells]
    axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_ylim(min(-0.1, 1.3 * min(lost)), 1.5 * max(0.1, *lost))
    axes.set_xlabel(f"stored bytes of the treated layers (original: {amount(results.total)})")
    axes.set_ylabel("points of test accuracy lost, mean over seeds")
    axes.set_title(f"{results.experiment.name}: every contender (grey: the others)")
    axes.grid(alpha=0.2)
    _name(axes, {name: lines[name] for name in SHOWN if name in lines}, list(lines.values()))
    return canvas


def _along(line: Any, axes: Any) -> np.ndarray:
    """Pixels along a line, close together (p x 2)."""
    points = axes.transData.transform(np.column_stack(line.get_data()))
    steps = np.linspace(0, 1, 60)[:, None]
    parts = [first + steps * (second - first) for first, second in pairwise(points)]
    return np.concatenate([points, *parts])


Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _cost(box: Box, own: np.ndarray, named: list[np.ndarray], grey: list[np.ndarray]) -> float:
    """How bad a place for a name is: lines under it, those with names three times, and others' lines nearer than its own."""
    low, high = np.array(box[:2]), np.array(box[2:])
    covered = [float(((line > low) & (line < high)).all(1).sum()) for line in (*grey, own, *named)]
    away = [float(np.hypot(*(line - (low + high) / 2).T).min()) for line in (own, *named)]
    nearest = min(away[1:], default=np.inf)
    return sum(covered) + 2 * sum(covered[len(grey) :]) + 20 * max(0.0, away[0] / max(nearest, 1.0) - 0.7)


def _name(axes: Any, named: dict[str, Any], lines: list[Any]) -> None:
    """Write each line's name beside one of its points, where it covers no other name and least of the lines."""
    axes.figure.draw_without_rendering()  # fixes the layout
    window, unit = axes.get_window_extent(), axes.figure.dpi / 72
    along = {name: _along(line, axes) for name, line in named.items()}
    grey = [_along(line, axes) for line in lines if line not in named.values()]
    taken: list[Box] = []
    for name, line in named.items():
        points = np.column_stack(line.get_data())
        text = axes.annotate(
            name, points[0], xytext=(0, 0), textcoords="offset points", color=line.get_color(), fontsize=9,
            fontweight="bold", ha="center", va="center", zorder=5,
        )  # fmt: skip
        extent = text.get_window_extent()
        half = np.array([extent.width, extent.height]) / 2 + 2 * unit
        rivals = [pixels for other, pixels in along.items() if other != name]
        best: tuple[float, Any, Any, Box] | None = None
        for point, side, away in product(points, AROUND, (4, 12, 22)):
            offset = np.array(side) * (half + away * unit)
            centre = axes.transData.transform(point) + offset
            box: Box = (*(centre - half), *(centre + half))
            inside = window.x0 < box[0] and window.y0 < box[1] and box[2] < window.x1 and box[3] < window.y1
            if inside and not any(_overlap(box, other) for other in taken):
                cost = away / 4 + _cost(box, along[name], rivals, grey)
                if best is None or cost < best[0]:
                    best = cost, point, offset / unit, box
        if best is None:
            text.remove()
        else:
            text.xy = best[1]
            text.set_position(tuple(best[2]))
            taken.append(best[3])
