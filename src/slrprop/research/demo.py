"""The demonstration: a network on scikit-learn's digits, compressed by every method at several ranks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from slrprop.api import apply, plan
from slrprop.errors import SlrpropError
from slrprop.export import export_onnx
from slrprop.files import holding, made_folder, replacing, scratch, together
from slrprop.latency import latencies
from slrprop.measure import measure
from slrprop.progress import Progress

WIDTH, EPOCHS, BATCH = 768, 12, 64
RANKS = (2, 4, 8, 16, 32, 64)
METHODS = ("svd", "slr", "slrprop")
LAYERS = ["2", "4"]
TRAIN, SELECT = 1000, 1397  # samples 0..999 train and calibrate, 1000..1396 choose, the rest tests
FILES, MARK = ("original.onnx", "demo.onnx", "data.npz", "demo.png"), "slrprop demo"
ALLOWED_DROP = 1.0  # points of accuracy on the choosing part


@dataclass(frozen=True)
class Row:
    """One network of the demonstration; latency in seconds."""

    name: str
    numbers: int
    bytes: int
    choosing: float
    testing: float
    latency: float


def digits() -> tuple[Tensor, Tensor]:
    """1797 handwritten digits, 8 x 8, scaled to [0, 1], shuffled once."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return torch.from_numpy(x[order] / 16).float(), torch.from_numpy(y[order])


def train(x: Tensor, y: Tensor) -> nn.Module:
    """A 64-768-768-768-10 ReLU network."""
    torch.manual_seed(0)
    wide = [part for _ in range(2) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), *wide, nn.Linear(WIDTH, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in Progress(range(EPOCHS), desc="training", unit="epoch"):
        for chosen in torch.randperm(len(x)).split(BATCH):
            loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def run(output: Path) -> tuple[list[Row], Row]:
    """Train, compress, measure; write the smallest good network and the figure to ``output``.

    The original network and the samples it was not trained on lie beside them, for ``slrprop compress``.

    Raises:
        SlrpropError: the folder can't be made, or holds files of those names that are another's.

    Returns:
        All rows, the original first, and the chosen one: the smallest file that loses at most one point of
        accuracy on the choosing part.
    """
    made_folder(output)
    _require_own(output)
    x, y = digits()
    model = train(x[:TRAIN], y[:TRAIN])
    networks = {"original": model}
    for method in METHODS:
        for rank in Progress(RANKS, desc=method, unit="rank"):
            made = plan(model, (x[:TRAIN], y[:TRAIN]), method=method, layers=LAYERS, rank=rank)
            networks[f"{method}, rank {rank}"] = apply(model, made)
    with scratch() as folder:
        files = {name: folder / f"{index}.onnx" for index, name in enumerate(networks)}
        for name, path in Progress(files.items(), desc="exporting and checking", unit="file"):
            export_onnx(networks[name], path, x[:4])
        times = latencies(files, [x[:1].numpy()], repetitions=200)
        rows = []
        for name, small in networks.items():
            choosing, testing = (
                measure(small, (x[TRAIN:SELECT], y[TRAIN:SELECT])),
                measure(small, (x[SELECT:], y[SELECT:])),
            )
            rows.append(
                Row(
                    name, choosing.numbers, files[name].stat().st_size, choosing.accuracy, testing.accuracy, times[name]
                )
            )
        good = [row for row in rows if row.choosing >= rows[0].choosing - ALLOWED_DROP]
        best = min(good, key=lambda row: row.bytes)
        with together():
            _require_own(output)
            for name, chosen in (("original.onnx", "original"), ("demo.onnx", best.name)):
                with replacing(output / name) as part:
                    part.write_bytes(files[chosen].read_bytes())
            with replacing(output / "data.npz") as part, open(part, "wb") as file:
                np.savez(file, x=x[TRAIN:].numpy(), targets=y[TRAIN:].numpy())
            with replacing(output / "demo.png") as part:
                _figure(rows, best).savefig(part, dpi=120, format="png", metadata={"Software": MARK})
    return rows, best


def _require_own(folder: Path) -> None:
    """The four files of an earlier demonstration may be replaced; its figure tells that they are one's."""
    there = [name for name in FILES if (folder / name).exists()]
    if there and (FILES[-1] not in there or holding(MARK)(folder / FILES[-1])):
        raise SlrpropError(f"'{folder}' holds {', '.join(there)} that no demonstration wrote; name another folder")


def _figure(rows: list[Row], best: Row) -> Any:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7, 4.5), layout="constrained")
    axes = canvas.add_subplot()
    for method in METHODS:
        chosen = [row for row in rows if row.name.startswith(f"{method},")]
        axes.plot([row.bytes / 1000 for row in chosen], [row.testing for row in chosen], marker="o", label=method)
    axes.plot(rows[0].bytes / 1000, rows[0].testing, "k*", markersize=12, label="original")
    axes.plot(
        best.bytes / 1000,
        best.testing,
        "o",
        markersize=14,
        fillstyle="none",
        color="black",
        label=f"chosen: {best.name}",
    )
    axes.set_xscale("log")
    ticks = (300, 400, 600, 1000, 2000, 5000)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("ONNX file, kB")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("Handwritten digits, 64-768-768-768-10")
    axes.grid(alpha=0.25)
    axes.legend()
    return canvas
