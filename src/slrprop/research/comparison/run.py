"""Compress by every contender at every size, and measure on the test set, which no choice has seen."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from slrprop.api import apply, plan_problem, realised
from slrprop.export import export_onnx
from slrprop.files import scratch
from slrprop.latency import latencies
from slrprop.network import OnnxNetwork
from slrprop.network.junction import Junction
from slrprop.network.onnx.file import OnnxFile
from slrprop.parallel import each
from slrprop.plan import Plan, wording
from slrprop.progress import Progress
from slrprop.research import require_seen
from slrprop.research.bench import Bench, in_parts
from slrprop.research.comparison.contenders import CONTENDERS, NARROWER, ORIGINAL, Contender
from slrprop.research.datasets import Dataset
from slrprop.research.experiments import Experiment, train_missing, weights_of
from slrprop.research.store import Store
from slrprop.research.training import Recipe, fit
from slrprop.search.path import Choice
from slrprop.search.result import parse_size

HEAD = Recipe(epochs=20, batch=128, learning_rate=1e-3)  # of a narrower head where the convolutions stay as they are
SLOW_SEEDS = 3
SHARES = 128  # steps of what methods keep that treat all layers together
KEYS = ("experiment", "seed", "method", "size")


@dataclass(frozen=True)
class Comparison:
    """A contender at a size: stored ``bytes`` of the treated layers (biases, scales, indices: all), at most ``size``.

    ``accuracy`` and ``agreement`` (with the original's answers) in percent, ``loss`` the mean cross-entropy, all on the test
    set. ``file_bytes`` and ``latency`` (seconds for one sample, one thread) are of the whole network's ONNX file,
    ``faster`` the original's latency over it in the same interleaved run; NaN where not measured. ``seconds`` to compress.
    """

    experiment: str
    seed: int
    method: str
    size: int
    bytes: int
    numbers: int
    accuracy: float
    agreement: float
    loss: float
    file_bytes: float
    latency: float
    faster: float
    seconds: float
    plan: str


class Compared(Bench):
    """A bench whose plans are measured: on the test set, and as whole files."""

    def __init__(self, experiment: Experiment, seed: int, data: Dataset, folder: Path) -> None:
        super().__init__(experiment, seed, data, folder)
        self._onnx: tuple[Path, dict[str, str]] | None = None
        self._scratch = contextlib.ExitStack()  # closed when the bench goes

    def row(
        self,
        method: str,
        size: int,
        plan: Plan | None,
        model: nn.Module,
        seconds: float,
        timed: bool,
        x: Tensor | None = None,
    ) -> Comparison:
        """Measure a head on the test set, or on other features of it; the whole network's file where asked."""
        logits = in_parts(model, self.x_test if x is None else x)
        labels = self.data.y_test
        file_bytes, latency, faster = self.file(plan) if timed and plan is not None else (float("nan"),) * 3
        stored, numbers = self.experiment.stored(model)
        told = "" if plan is None else "; ".join(f"{layer.name}: {wording(layer)}" for layer in plan.layers)
        return Comparison(
            self.experiment.name, self.seed, method, size, stored, numbers,
            100 * float((logits.argmax(1) == labels).double().mean()),
            100 * float((logits.argmax(1) == self.logits.argmax(1)).double().mean()),
            float(nn.functional.cross_entropy(logits.double(), labels)), file_bytes, latency, faster, seconds, told,
        )  # fmt: skip

    def original(self, timed: bool) -> Comparison:
        """Measure the network as it was trained."""
        total = self.experiment.stored(self.head)[0]
        return self.row(ORIGINAL, total, Plan(()), self.head, 0.0, timed)

    def file(self, plan: Plan) -> tuple[float, float, float]:
        """Bytes and latency of the whole network's ONNX file, and how many times faster than the original it is."""
        if self._onnx is None:
            path = self._scratch.enter_context(scratch()) / "original.onnx"
            export_onnx(self.model, path, self.data.x_test[:2])
            network = OnnxNetwork(path, None)
            self._onnx = path, {network.fingerprint(name): name for name in network.names}
        path, names = self._onnx
        of = {name: names[self.network.fingerprint(name)] for name in self.network.names}
        moved = replace(
            plan,
            layers=tuple(replace(layer, name=of[layer.name]) for layer in plan.layers),
            junctions=tuple(
                Junction(
                    tuple(of[name] for name in junction.makers),
                    (),
                    {of[name]: rows for name, rows in junction.readers.items()},
                )
                for junction in plan.junctions
            ),
        )
        small = path.with_name("small.onnx")
        made = realised(path, moved)
        assert isinstance(made, OnnxFile)
        size = made.write(small)  # also where it is larger than the original's
        times = latencies({"original": path, "small": small}, [self.data.x_test[:1].numpy()], 200)
        return float(size), times["small"], times["original"] / times["small"]


def plans_of(bench: Compared, contender: Contender, sizes: list[int]) -> Iterator[tuple[int, Plan, float]]:
    """The contender's plan at every size that it can reach, and the seconds that took."""
    if contender.shares is not None:
        known: dict[int, int] = {}
        for size in sizes:
            start = time.perf_counter()
            low, high = 0, SHARES  # the largest share whose plan fits
            while low < high:
                middle = (low + high + 1) // 2
                if middle not in known:  # bytes hang on how many neurons stay, not on what is fitted
                    rough = _by_share(bench, contender.shares, middle, refit=False, sequential=False)
                    known[middle] = bench.experiment.stored(apply(bench.head, rough))[0]
                low, high = (middle, high) if known[middle] <= size else (low, middle - 1)
            if low:
                yield size, _by_share(bench, contender.shares, low), time.perf_counter() - start
        return
    yield from bench.best(contender.choices, sizes)


def _by_share(bench: Compared, choice: Choice, step: int, **more: object) -> Plan:
    """The plan of a method that treats all layers together and keeps ``step`` of ``SHARES`` parts."""
    method, settings = choice
    return plan_problem(bench.problem, method, list(bench.experiment.layers), keep=step / SHARES, **settings, **more)


def narrower_widths(experiment: Experiment, shapes: dict[str, tuple[int, int]], size: int) -> list[int] | None:
    """Widths between the dense layers that store at most ``size`` bytes: in the original's proportion, then the later ones larger."""
    (inputs, _), *_ = shapes.values()
    whole = [n for _, n in shapes.values()][:-1]

    def fits(widths: list[int]) -> bool:
        sides = dict(zip(shapes, pairwise([inputs, *widths, 0]), strict=True))
        return 4 * sum((m + 1) * n for m, n in (sides[name] for name in experiment.layers)) <= size

    steps = range(256, 0, -1)
    best = next((widths for s in steps if fits(widths := [max(1, round(n * s / 256)) for n in whole])), None)
    for place in reversed(range(len(whole))):
        while (
            best is not None
            and best[place] < whole[place]
            and fits(wider := [*best[:place], best[place] + 1, *best[place + 1 :]])
        ):
            best = wider
    return best


def narrower(bench: Compared, size: int) -> Comparison | None:
    """A network with fewer neurons between its dense layers, trained from scratch by the same recipe; the head alone where there are convolutions."""
    experiment, data = bench.experiment, bench.data
    best = narrower_widths(experiment, {name: bench.network.shape(name) for name in bench.network.names}, size)
    if best is None:
        return None
    start, label = time.perf_counter(), f"{experiment.name} narrower {best} seed {bench.seed}"
    with torch.random.fork_rng():
        torch.manual_seed(bench.seed)
        model = experiment.network(widths=tuple(best))
        if experiment.recipe.convolutional:
            head, x = model.head(), bench.x_test
            fit(head, HEAD, replace(data, x_train=bench.x_train, x_test=bench.x_test), label)
        else:
            fit(model, experiment.recipe, data, label)
            head, x = model.head(), in_parts(model.front, data.x_test)
    row = bench.row(NARROWER, size, None, head, time.perf_counter() - start, False, x)
    return replace(row, plan=f"widths {'-'.join(map(str, best))}")


class Benches:
    """Benches by seed, made where they are needed; the last one is kept."""

    def __init__(self, experiment: Experiment, data: Dataset, folder: Path) -> None:
        self.experiment, self.data, self.folder = experiment, data, folder.absolute()
        self._last: Compared | None = None

    def of(self, seed: int, store: Store[Comparison]) -> Compared:
        """The bench of a seed whose network was trained before, the same that the store has rows of."""
        if self._last is None or self._last.seed != seed:
            self._last = None  # frees its memory first
            require_seen(weights_of(self.experiment, seed, self.folder))
            made = Compared(self.experiment, seed, self.data, self.folder)
            store.require_same(made.original(timed=False), "accuracy", "loss")
            self._last = made
        return self._last


def compare(
    experiment: Experiment, data: Dataset, folder: Path, sizes: list[str], seeds: int, store: Store[Comparison],
    chosen: Callable[[Contender], bool] = lambda _: True, timed: bool = True, workers: int = 1, cluster: str | None = None,
) -> int:  # fmt: skip
    """Compute every missing row; returns how many were computed. A size that a contender can't reach has none.

    Args:
        sizes: stored bytes of the treated layers, absolute or as shares.
        timed: measure files and latencies (on the first seed only).
        workers: processes, and ``cluster`` a Ray cluster, that share the contenders (:func:`slrprop.parallel.each`).
    """
    done = {store.key(row) for row in store.results(experiment.name)}
    total = experiment.stored(experiment.untrained_head())[0]
    limits = sorted({parse_size(size, total, "--bytes") for size in sizes})
    contenders = [
        (Contender(ORIGINAL, ""), [total]),
        *((contender, limits) for contender in CONTENDERS if chosen(contender) and contender.fits(experiment)),
    ]
    tasks = [
        (seed, contender, missing)
        for seed in range(seeds)
        for contender, at in contenders
        if (missing := [size for size in at if (experiment.name, seed, contender.name, size) not in done])
        and (seed < SLOW_SEEDS or not contender.slow)
    ]
    train_missing(experiment, sorted({seed for seed, _, _ in tasks}), data, folder, workers, cluster)
    new, shared = 0, (Benches(experiment, data, folder), store, timed)
    with Progress(total=len(tasks), desc=experiment.name, unit="contender") as bar:
        for (seed, contender, _), count in each(_contend, tasks, shared, workers, cluster):
            new += count
            bar.update()
            bar.set_postfix_str(f"seed {seed}, {contender.name}")
    return new


def _contend(task: tuple[int, Contender, list[int]], benches: Benches, store: Store[Comparison], timed: bool) -> int:
    """Compute the missing rows of a contender on a seed."""
    seed, contender, sizes = task
    count = 0
    for row in _rows(benches.of(seed, store), contender, sizes, timed and seed == 0):
        store.add(row)
        count += 1
    return count


def _rows(bench: Compared, contender: Contender, sizes: list[int], timed: bool) -> Iterator[Comparison]:
    if contender.name == ORIGINAL:
        yield bench.original(timed)
        return
    if contender.name == NARROWER:
        for size in sizes:
            row = narrower(bench, size)
            if row is not None:
                yield row
        return
    for size, plan, seconds in plans_of(bench, contender, sizes):
        start = time.perf_counter()
        if contender.tuned:
            plan = bench.tuned(plan)
        seconds += time.perf_counter() - start
        yield bench.row(contender.name, size, plan, apply(bench.head, plan), seconds, timed)
