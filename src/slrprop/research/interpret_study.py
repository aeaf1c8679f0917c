"""``slrprop paper run interpret-room``: information control in a deep narrow network, and what its collapse then resembles."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn

from slrprop.checks import require_choice
from slrprop.parallel import each
from slrprop.progress import Progress
from slrprop.research.datasets import Dataset
from slrprop.research.interpret import InformationControl, References, collapse
from slrprop.research.store import Store
from slrprop.research.tables import COLOURS, curve, markdown, paired, plus_minus

NAME, DATASET = "interpret-room", "room"
KEYS = ("experiment", "table", "seed", "control", "epoch")
EPOCHS, RECORDED = 20, (1, 5, 10, 15, 20)
BATCH = {"room": 64, "breast cancer": 8}
LAST = 15  # the epoch after whose control training is left alone, so that every network ends on ordinary steps
GENTLE = {"strength": 0.1}  # the article's products at full strength leave little of a network of ten layers
CONTROLS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "raise": {"schedule": "raise", **GENTLE},
    "lower": {"schedule": "lower", **GENTLE},
    "alternate": {"schedule": "alternate", **GENTLE},
    "alternate, cost forced": {"schedule": "alternate", "theta": 0.9, **GENTLE},
    "alternate, full strength": {"schedule": "alternate"},
}


@dataclass(frozen=True)
class Interpretation:
    """A network at an epoch. ``accuracy`` in percent of the test rows (``fitted``: of the training rows); ``information`` G, ``selectivity`` (1 - G / connections) and ``cost`` of all layers.

    What its collapse, by ``product`` and by ``gradients``, correlates with (:class:`slrprop.research.interpret.Likeness`), on the training rows.
    """

    experiment: str
    table: str
    seed: int
    control: str
    epoch: int
    accuracy: float
    fitted: float
    information: float
    selectivity: float
    cost: float
    product_correlation: float
    product_logistic: float
    product_permutation: float
    gradients_correlation: float
    gradients_logistic: float
    gradients_permutation: float


ROW = Interpretation
WAYS = ("product", "gradients")


def network(inputs: int, outputs: int, depth: int = 10, width: int = 10) -> nn.Sequential:
    """Ten hidden layers of ten tanh units, as in the article's experiments."""
    sizes = [inputs, *[width] * depth]
    hidden = [part for m, n in itertools.pairwise(sizes) for part in (nn.Linear(m, n), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


def breast_cancer(seed: int) -> Dataset:
    """Scikit-learn's table of 569 tumours with 30 measures; 30 % of them, drawn from ``seed``, test; standardised on the others."""
    x, y = load_breast_cancer(return_X_y=True)
    parts = train_test_split(x, y, test_size=0.3, random_state=seed, stratify=y)
    mean, deviation = parts[0].mean(0), parts[0].std(0)
    one, other = (torch.from_numpy((part - mean) / deviation).float() for part in parts[:2])
    return Dataset(one, torch.from_numpy(parts[2]), other, torch.from_numpy(parts[3]))


def run(
    data: Dataset, folder: Path, seeds: int, store: Store[Interpretation], workers: int = 1, cluster: str | None = None,
    methods: Sequence[str] = (),
) -> int:  # fmt: skip
    """Compute every missing row; returns how many were computed."""
    for name in methods:
        require_choice("method", name, CONTROLS)
    done = {store.key(row)[1:] for row in store.results(NAME)}
    controls = [control for control in CONTROLS if not methods or control in methods]
    tasks = [(table, seed) for seed in range(seeds) for table in BATCH]
    missing = {
        task: [c for c in controls if any((*task, c, epoch) not in done for epoch in RECORDED)] for task in tasks
    }
    some = [(*task, tuple(left)) for task, left in missing.items() if left]
    with Progress(total=sum(map(len, missing.values())), desc=NAME, unit="network") as bar:
        for (*_, left), _ in each(_train, some, (data, store), workers, cluster):
            bar.update(len(left))
    return len(RECORDED) * sum(map(len, missing.values()))


def _train(task: tuple[str, int, tuple[str, ...]], room: Dataset, store: Store[Interpretation]) -> None:
    table, seed, controls = task
    data = room if table == "room" else breast_cancer(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        begun = network(data.x_train.shape[1], int(data.y_train.max()) + 1)
    known: References | None = None
    for control in controls:
        model = copy.deepcopy(begun)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        random = torch.Generator().manual_seed(seed)
        options = CONTROLS[control]
        controlled = InformationControl(model, **(options or {"schedule": "raise"}))
        for epoch in range(1, EPOCHS + 1):
            for rows in torch.randperm(len(data.x_train), generator=random).split(BATCH[table]):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(data.x_train[rows]), data.y_train[rows]).backward()
                optimizer.step()
            if options and epoch <= LAST:
                controlled.step()
            if epoch in RECORDED:
                known = known or References.of((data.x_train, data.y_train))
                store.add(_recorded(table, seed, control, epoch, model, controlled, data, known))


def _recorded(
    table: str, seed: int, control: str, epoch: int, model: nn.Module, controlled: InformationControl, data: Dataset,
    known: References,
) -> Interpretation:  # fmt: skip
    with torch.no_grad():
        tested, fitted = (
            100 * float((model(x).argmax(-1) == y).double().mean())
            for x, y in ((data.x_test, data.y_test), (data.x_train, data.y_train))
        )
    alike = [known.compare(collapse(model, data.x_train, by)) for by in WAYS]
    connections = sum(layer.weight.numel() for layer in controlled.layers.values())
    g = controlled.selective_information()
    return Interpretation(
        NAME, table, seed, control, epoch, tested, fitted, g, 1 - g / connections, controlled.cost(),
        *vars(alike[0]).values(), *vars(alike[1]).values(),
    )  # fmt: skip


MEASURES = {
    "accuracy": "test accuracy, %", "selectivity": "selectivity, 1 - G / connections", "cost": "cost C",
    "product_correlation": "product: correlation with\ninput-target correlations", "product_logistic": "product: correlation with\nlogistic regression",
}  # fmt: skip


def page(rows: list[Interpretation]) -> str:
    """The last epoch of every control: mean ± deviation over the seeds, and differences to no control with 95 % intervals."""
    text = [
        "# Information control and collapse\n",
        "Made by `slrprop paper run interpret-room` and `slrprop paper table interpret-room`.\n",
    ]
    shown = [field.name for field in fields(Interpretation)][len(KEYS) :]
    for table in BATCH:
        places = {name: (table, name, EPOCHS) for name in CONTROLS}
        last = {name: [row for row in rows if (row.table, row.control, row.epoch) == at] for name, at in places.items()}
        last = {name: found for name, found in last.items() if found}
        if not last:
            continue
        lines = [["control", "seeds", *(name.replace("_", ", ") for name in shown)]]
        lines += [
            [name, str(len(found)), *(plus_minus([getattr(row, key) for row in found]) for key in shown)]
            for name, found in last.items()
        ]
        base = {key: {row.seed: getattr(row, key) for row in last.get("none", [])} for key in shown}
        differences = [["less no control", *lines[0][2:]]]
        differences += [
            [name, *(paired({row.seed: getattr(row, key) for row in found}, base[key]) for key in shown)]
            for name, found in last.items() if name != "none"
        ]  # fmt: skip
        text += [f"## {table.capitalize()}, epoch {EPOCHS}\n", markdown(lines), markdown(differences)]
    return "\n".join(text)


def figures(rows: list[Interpretation], folder: Path) -> dict[str, Any]:
    """Every measure along training."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(3.3 * len(MEASURES), 5.8), layout="constrained")
    for line, table in zip(canvas.subplots(len(BATCH), len(MEASURES), squeeze=False), BATCH, strict=True):
        for axes, (key, label) in zip(line, MEASURES.items(), strict=True):
            for index, (control, colour) in enumerate(zip(CONTROLS, COLOURS, strict=False)):
                some = [row for row in rows if (row.table, row.control) == (table, control)]
                values = {epoch: [getattr(row, key) for row in some if row.epoch == epoch] for epoch in RECORDED}
                curve(axes, values, 0.15 * (index - 2), color=colour, label=control)
            axes.set_ylabel(label, fontsize=9)
            axes.set_title(table, fontsize=9)
            axes.grid(alpha=0.25)
            axes.set_xlabel("epoch", fontsize=9)
    canvas.axes[0].legend(fontsize=7)
    return {NAME: canvas}
