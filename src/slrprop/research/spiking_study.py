"""``slrprop paper run spiking-mnist``: neurons pruned while a spiking network learns, after it, and a smaller network from scratch."""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slrprop.checks import require_choice
from slrprop.files import made_folder
from slrprop.parallel import each
from slrprop.progress import Progress
from slrprop.research.datasets import Dataset
from slrprop.research.spiking import STRATEGIES, Operations, Pruning, SpikingNetwork, Training, fewest
from slrprop.research.store import Store
from slrprop.research.tables import COLOURS, curve, markdown, paired, plus_minus, spread, times

NAME, DATASET = "spiking-mnist", "mnist"
KEYS = ("experiment", "neurons", "seed", "strategy", "percent", "start")
IMAGES = {100: 15_000, 400: 60_000, 800: 60_000}  # that a network of so many neurons learns from
LABELLED = 4_000  # training images that say what neurons stand for
UNPRUNED, STOPPED = "unpruned", "unpruned, stopped"
AFTER, RECENT, SCRATCH = "after training", "after training, by 250 images", "from scratch"
SLOWED = "adaptive, thresholds slowed"
METHODS = (*STRATEGIES, SLOWED, AFTER, RECENT, SCRATCH)
LEARNING: dict[str, dict[str, Any]] = {
    **{name: {"strategy": name} for name in STRATEGIES},
    SLOWED: {"strategy": STRATEGIES[-1], "slow": 1.0},
}
SHARES, STARTS, USUAL = (10, 20, 30, 40, 50, 60, 70), (20, 60), (50, 40)  # percent pruned, percent of the images before


@dataclass(frozen=True)
class Spiking:
    """One trained network. ``percent`` of its ``neurons`` pruned from ``start`` percent of the images on; accuracy in percent.

    ``left`` neurons; ``late`` of the others went at the end, because the strategy had not found enough. Operations (see
    :class:`slrprop.research.spiking.Operations`): of the whole training, and of inference per image, as are the ``spikes`` of the neurons;
    ``theta``: their mean threshold, in mV. Milliseconds of one core per image, ``ms_unpruned`` those of the unpruned network, measured in turn
    with it.
    """

    experiment: str
    neurons: int
    seed: int
    strategy: str
    percent: int
    start: int
    accuracy: float
    left: int
    late: int
    bytes: int
    synaptic_training: int
    updates_training: int
    synaptic: float
    spikes: float
    theta: float
    ms_training: float
    ms: float
    ms_unpruned: float


ROW = Spiking
Cell = tuple[int, int, str, int, int]  # neurons, seed, strategy, percent, start


def cells(seeds: int, methods: Sequence[str] = ()) -> list[Cell]:
    """What is to be computed, the most telling first. The larger networks have one seed, and half of them pruned."""
    percent, start = USUAL
    for name in methods:
        require_choice("method", name, (UNPRUNED, STOPPED, *METHODS))
    usual = [method for method in METHODS if method != SLOWED]
    waves: list[tuple[int, Sequence[str], Sequence[int], Sequence[int]]] = [
        (100, (UNPRUNED, *METHODS), (percent,), (start,)),
        (400, (UNPRUNED, *METHODS), (percent,), (start,)),
        (100, (STOPPED,), (0,), (start, *STARTS)),
        (100, usual, (10, 30, 70), (start,)),
        (100, STRATEGIES, (percent,), STARTS),
        (800, (UNPRUNED, *METHODS), (percent,), (start,)),
        (100, usual, (20, 40, 60), (start,)),
    ]
    found = [
        _named(neurons, seed, strategy, share, begin)
        for neurons, strategies, shares, starts in waves
        for share, begin in itertools.product(shares, starts)
        for seed in range(seeds if neurons == 100 else 1)
        for strategy in strategies
    ]
    return [cell for cell in found if not methods or cell[2] in methods]


def _named(neurons: int, seed: int, strategy: str, percent: int, start: int) -> Cell:
    """Without the numbers that mean nothing to the strategy."""
    percent = 0 if strategy in (UNPRUNED, STOPPED) else percent
    return neurons, seed, strategy, percent, start if strategy in (*LEARNING, STOPPED) else 0


def run(
    data: Dataset, folder: Path, seeds: int, store: Store[Spiking], workers: int = 1, cluster: str | None = None,
    methods: Sequence[str] = (),
) -> int:  # fmt: skip
    """Compute every missing row; returns how many were computed. Trained networks are kept in ``folder``."""
    folder = made_folder(folder.absolute())
    done = {store.key(row)[1:] for row in store.results(NAME)}
    missing = [cell for cell in cells(seeds, methods) if cell not in done]
    images = tuple(_flat(x) for x in (data.x_train, data.x_test))
    targets = data.y_train.numpy(), data.y_test.numpy()
    with Progress(total=len(missing), desc=NAME, unit="row") as bar:
        for _, wave in itertools.groupby(missing, lambda cell: cell[0]):
            some = list(wave)
            bases = dict.fromkeys((neurons, seed) for neurons, seed, *_ in some)
            new = [base for base in bases if not _file(folder, *base, 100).exists()]
            for _ in each(_base, new, (images, folder), workers, cluster):
                bar.refresh()
            for _ in each(_cell, some, (images, targets, folder, store), workers, cluster):
                bar.update()
    return len(missing)


def _flat(x: Any) -> Any:
    """MNIST as it was: without its padding to 32 x 32."""
    return x[:, 0, 2:-2, 2:-2].flatten(1).numpy()


def _file(folder: Path, neurons: int, seed: int, percent: int) -> Path:
    """The unpruned network after so many percent of the images."""
    return folder / f"{NAME}-{neurons}-seed{seed}-at{percent}.safetensors"


def _saved(folder: Path, cell: Cell) -> Path:
    """A cell's network."""
    neurons, seed, strategy, percent, start = cell
    return folder / f"{NAME}-{neurons}-seed{seed}-{strategy.replace(' ', '-')}-{percent}-from{start}.safetensors"


def _shown(indices: Any) -> Any:
    return Progress(indices, desc="images", unit="", leave=False)


def _base(task: tuple[int, int], images: tuple[Any, Any], folder: Path) -> None:
    """Train the unpruned network; it is kept at the places where pruning begins, which the pruned ones go on from."""
    neurons, seed = task
    training = Training(SpikingNetwork.untrained(images[0].shape[1], neurons, seed), IMAGES[neurons], seed)
    for percent in (*sorted((USUAL[1], *STARTS)), 100):
        network = training.run(images[0], until=training.total * percent // 100, progress=_shown)
        network.save(_file(folder, neurons, seed, percent))


def _cell(cell: Cell, images: tuple[Any, Any], targets: tuple[Any, Any], folder: Path, store: Store[Spiking]) -> None:
    """Train where that is needed, name what neurons stand for, test; keep the row."""
    neurons, seed, strategy, percent, start = cell
    (train, test), total, late, ms_training = images, IMAGES[neurons], 0, math.nan
    network = unpruned = SpikingNetwork.load(_file(folder, neurons, seed, 100))
    go = neurons * percent // 100
    if strategy in LEARNING:
        begun = SpikingNetwork.load(_file(folder, neurons, seed, start))
        training = Training(begun, total, seed, total * start // 100)
        pruning = Pruning(target=neurons - go, start=start / 100, **LEARNING[strategy])
        network, ms_training = _learned(training, train, pruning)
        late = training.pruned.get(total, 0)
    elif strategy == SCRATCH:
        fresh = SpikingNetwork.untrained(train.shape[1], neurons - go, seed)
        network, ms_training = _learned(Training(fresh, total, seed), train)
    elif strategy == STOPPED:
        network = SpikingNetwork.load(_file(folder, neurons, seed, start))
    elif strategy == UNPRUNED:  # some learn again, for the time
        again = SpikingNetwork.untrained(train.shape[1], neurons, seed)
        ms_training = _learned(Training(again, 1000, seed), train)[1]
    trained, labelled = network.operations, train[:LABELLED]
    if strategy in (AFTER, RECENT):
        judged = labelled if strategy == AFTER else train[total - Pruning.interval : total]
        network = unpruned.kept(fewest(unpruned.respond(judged, seed + 1000).sum(0), go))
    network.operations = Operations()
    network.label(network.respond(labelled, seed + 1000), targets[0][:LABELLED])
    counts = network.respond(test, seed + 2000)
    per_image = network.operations.synaptic / network.operations.images
    ms, ms_unpruned = _timed(network, unpruned, test)
    network.operations = trained
    network.save(_saved(folder, cell))
    store.add(
        Spiking(
            NAME, *cell, 100 * float((network.classify(counts) == targets[1]).mean()), network.neurons, late, network.bytes,
            trained.synaptic, trained.updates, per_image, float(counts.sum(1).mean()), float(network.theta.mean()),
            ms_training, ms, ms_unpruned,
        )
    )  # fmt: skip


def _learned(training: Training, images: Any, pruning: Pruning | None = None) -> tuple[SpikingNetwork, float]:
    """The trained network, and milliseconds of this core per image."""
    before, began = training.shown, time.thread_time()
    network = training.run(images, pruning, progress=_shown)
    return network, 1000 * (time.thread_time() - began) / (training.total - before)


def _timed(one: SpikingNetwork, other: SpikingNetwork, images: Any, rounds: int = 7) -> tuple[float, float]:
    """Milliseconds of this core per image, of both in turn: the fastest of some rounds of 50 images."""
    taken: dict[int, list[float]] = {0: [], 1: []}
    for turn in range(2 * rounds):
        network, some = (one, other)[turn % 2], images[25 * (turn - turn % 2) :][:50]
        began = time.thread_time()
        network.respond(some)
        taken[turn % 2].append(1000 * (time.thread_time() - began) / len(some))
    return min(taken[0]), min(taken[1])


def _accuracies(rows: list[Spiking], strategy: str, percent: int, start: int, neurons: int = 100) -> list[float]:
    """Of all seeds."""
    wanted = _named(neurons, 0, strategy, percent, start)
    return [row.accuracy for row in rows if (row.neurons, 0, row.strategy, row.percent, row.start) == wanted]


def page(rows: list[Spiking]) -> str:
    """Tables of what there is: mean ± deviation over the seeds, differences between networks of one seed with 95 % intervals."""
    text = [
        "# Neurons of a spiking network pruned while it learns\n",
        "Made by `slrprop paper run spiking-mnist` and `slrprop paper table spiking-mnist`.\n",
    ]
    for neurons in sorted({row.neurons for row in rows}):
        text.append(f"## Half of {neurons} neurons, {IMAGES[neurons]:,} images\n")
        text.append(markdown(_half_table([row for row in rows if row.neurons == neurons])))
    (percent, start), learning = USUAL, tuple(LEARNING)
    usual = [method for method in METHODS if method != SLOWED]
    lines = [["pruned, %", *usual]]
    lines += [
        [str(share), *(plus_minus(_accuracies(rows, method, share, start)) for method in usual)] for share in SHARES
    ]
    text += ["## Accuracy by share, 100 neurons\n", markdown(lines)]
    lines = [["images before pruning, %", *learning, "the unpruned network then"]]
    for begin in sorted((start, *STARTS)):
        found = [_accuracies(rows, method, percent, begin) for method in (*learning, STOPPED)]
        lines.append([str(begin), *map(plus_minus, found)])
    text += ["## Accuracy by when pruning begins, half of 100 neurons\n", markdown(lines)]
    return "\n".join(text)


def _half_table(rows: list[Spiking]) -> list[list[str]]:
    """Of one size: every method at half of the neurons, against the unpruned network of the same seed."""
    originals = {row.seed: row for row in rows if row.strategy == UNPRUNED}
    wanted = {_named(rows[0].neurons, 0, method, *USUAL)[2:]: method for method in (UNPRUNED, *METHODS)}
    found = {
        method: [row for row in rows if (row.strategy, row.percent, row.start) == key] for key, method in wanted.items()
    }
    accuracy = {method: {row.seed: row.accuracy for row in some} for method, some in found.items()}
    measures = {
        "memory": "bytes", "operations, inference": "synaptic", "operations, training": "synaptic_training",
        "weight updates": "updates_training",
    }  # fmt: skip
    lines = [
        ["", "seeds", "accuracy, %", "less unpruned", "adaptive threshold less this", *measures, "time", "ms an image",
         "spikes an image", "theta, mV"]
    ]  # fmt: skip
    for method, some in found.items():
        pairs = [(originals[row.seed], row) for row in some if row.seed in originals]
        if pairs:
            one, other = (list(side) for side in zip(*pairs, strict=True))
            fewer = [
                times([getattr(row, name) for row in one], [getattr(row, name) for row in other])
                for name in measures.values()
            ]
            fewer.append(times([row.ms_unpruned for row in other], [row.ms for row in other]))
            means = [spread([getattr(row, name) for row in other])[0] for name in ("ms", "spikes", "theta")]
            lines.append([
                method, str(len(some)), plus_minus(list(accuracy[method].values())),
                "" if method == UNPRUNED else paired(accuracy[method], accuracy[UNPRUNED]),
                "" if method in (UNPRUNED, STRATEGIES[-1]) else paired(accuracy[STRATEGIES[-1]], accuracy[method]),
                *(f"{value}x" for value in fewer), f"{means[0]:.2f}", f"{means[1]:.1f}", f"{means[2]:.0f}",
            ])  # fmt: skip
    return lines


def figures(rows: list[Spiking], folder: Path) -> dict[str, Any]:
    """Curves, and receptive fields of the first seed's networks where they are in ``folder``."""
    from matplotlib.figure import Figure

    from slrprop.research.figures import receptive_fields

    canvas = Figure(figsize=(11, 4.6), layout="constrained")
    shares, starts = canvas.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    percent, start = USUAL
    curve(shares, {0: _accuracies(rows, UNPRUNED, 0, 0)}, color="black", label=UNPRUNED)
    curve(starts, {at: _accuracies(rows, STOPPED, 0, at) for at in (start, *STARTS)}, color="black", label=STOPPED)
    for index, (method, colour) in enumerate(zip(METHODS, COLOURS[1:], strict=False)):
        aside = 0.25 * (index - 3)
        by_share = {share: _accuracies(rows, method, share, start) for share in SHARES}
        curve(shares, by_share, aside, color=colour, label=method)
        if method in LEARNING:
            by_start = {at: _accuracies(rows, method, percent, at) for at in (start, *STARTS)}
            curve(starts, by_start, aside, color=colour, label=method)
    for axes in (shares, starts):
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    shares.set_xlabel(f"neurons pruned, % (pruning from {start} % of the images on)")
    starts.set_xlabel("images before pruning begins, % (half of the neurons pruned)")
    shares.set_ylabel("test accuracy, %")
    canvas.suptitle(f"Spiking network of 100 neurons, {IMAGES[100]:,} MNIST images", fontsize=11)
    shown = {
        f"before: 100 neurons, {start} % of the images": _file(folder, 100, 0, start),
        "after: half pruned while learning (adaptive)": _saved(folder, (100, 0, STRATEGIES[-1], *USUAL)),
        "unpruned": _saved(folder, (100, 0, UNPRUNED, 0, 0)),
        "half pruned after training": _saved(folder, (100, 0, AFTER, percent, 0)),
    }
    if not all(path.exists() for path in shown.values()):
        return {NAME: canvas}
    weights = [SpikingNetwork.load(path).weight for path in shown.values()]
    return {NAME: canvas, f"{NAME}-fields": receptive_fields(list(shown), weights)}
