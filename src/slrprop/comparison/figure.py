"""The frontier as a figure: accuracy lost against stored bytes."""

import statistics
from itertools import pairwise
from typing import Any

import numpy as np

from slrprop.comparison.contenders import NARROWER
from slrprop.comparison.results import Results, amount

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
        if not apart or size > 1.2 * apart[-1]:
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


def _name(axes: Any, named: dict[str, Any], lines: list[Any]) -> None:
    """Write each line's name beside one of its points, where it covers no other name and least of the lines."""
    axes.figure.draw_without_rendering()  # fixes the layout
    frame, unit = axes.get_window_extent(), axes.figure.dpi / 72
    others = {id(line): _along(line, axes) for line in lines}
    taken: list[tuple[float, float, float, float]] = []
    for name, line in named.items():
        text = axes.annotate(
            name, (line.get_xdata()[0], line.get_ydata()[0]), xytext=(0, 0), textcoords="offset points",
            color=line.get_color(), fontsize=9, fontweight="bold", ha="center", va="center", zorder=5,
        )  # fmt: skip
        size = text.get_window_extent()
        half = np.array([size.width, size.height]) / 2 + 2 * unit
        best = None
        for point in np.column_stack(line.get_data()):
            pixel = axes.transData.transform(point)
            for side in AROUND:
                for away in (4, 12, 22):
                    centre = pixel + np.array(side) * (half + away * unit)
                    low, high = centre - half, centre + half
                    outside = low[0] < frame.x0 or low[1] < frame.y0 or high[0] > frame.x1 or high[1] > frame.y1
                    hit = any(low[0] < x1 and x0 < high[0] and low[1] < y1 and y0 < high[1] for x0, y0, x1, y1 in taken)
                    if outside or hit:
                        continue
                    covered = sum(
                        float(((along > low) & (along < high)).all(1).sum())
                        * (3 if key in map(id, named.values()) else 1)
                        for key, along in others.items()
                    )
                    nearer = min(
                        float(np.hypot(*(others[id(rival)] - centre).T).min()) for rival in named.values() if rival is not line
                    ) if len(named) > 1 else np.inf  # fmt: skip
                    own = float(np.hypot(*(others[id(line)] - centre).T).min())
                    cost = covered + away / 4 + 20 * max(0.0, own / max(nearer, 1.0) - 0.7)
                    if best is None or cost < best[0]:
                        best = cost, point, (centre - pixel) / unit, (*low, *high)
        if best is None:
            text.remove()
            continue
        _, text.xy, offset, box = best
        text.set_position(tuple(offset))
        taken.append(box)
