"""Pictures of matrices: receptive fields, and which inputs drive which outputs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator


def heatmaps(titles: Sequence[str], matrices: Sequence[Any]) -> Figure:
    """Matrices (inputs x outputs) side by side, each in units of its largest entry."""
    count, (inputs, outputs) = len(matrices), matrices[0].shape
    canvas = Figure(
        figsize=(1.5 + count * min(6, max(2.2, 0.35 * outputs)), min(9, max(3, 0.22 * inputs))), layout="constrained"
    )
    places = canvas.subplots(1, count, squeeze=False, sharey=True)[0]
    for axes, title, matrix in zip(places, titles, matrices, strict=True):
        array = np.asarray(matrix)
        image = axes.imshow(
            array / max(abs(array).max(), 1e-300), cmap="RdBu", vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
        )
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("output")
        for axis, size in ((axes.xaxis, outputs), (axes.yaxis, inputs)):
            axis.set_major_locator(MaxNLocator("auto", integer=True) if size > 40 else FixedLocator(range(size)))
    places[0].set_ylabel("input")
    canvas.colorbar(image, ax=places, shrink=0.8, label="effect of one standard\ndeviation, of the largest")
    return canvas


def receptive_fields(titles: Sequence[str], weights: Sequence[Any], columns: int = 10) -> Figure:
    """What each neuron's weights (inputs x neurons) of square images look like; networks side by side."""
    canvas = Figure(figsize=(4.6 * len(weights), 4.9), layout="constrained")
    for axes, title, weight in zip(canvas.subplots(1, len(weights), squeeze=False)[0], titles, weights, strict=True):
        side, neurons = round(len(weight) ** 0.5), weight.shape[1]
        rows = max(-(-w.shape[1] // columns) for w in weights)
        picture = np.full((rows * (side + 1), columns * (side + 1)), np.nan)
        for j in range(neurons):
            top, left = (side + 1) * (j // columns), (side + 1) * (j % columns)
            picture[top : top + side, left : left + side] = weight[:, j].reshape(side, side)
        axes.imshow(picture, cmap="inferno", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    return canvas
