"""Compress by every contender at every size, and measure on the test set, which no choice has seen."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from slrprop.api import apply, plan_problem
from slrprop.comparison.contenders import CONTENDERS, NARROWER, ORIGINAL, Contender
from slrprop.data import Data
from slrprop.export import export_onnx
from slrprop.files import require_seen
from slrprop.latency import latencies
from slrprop.methods import Problem
from slrprop.network import OnnxNetwork, TorchNetwork
from slrprop.network.base import fingerprint
from slrprop.paper.datasets import Dataset
from slrprop.paper.experiments import Experiment, train_missing, trained, weights_of
from slrprop.paper.networks import DenseHead
from slrprop.paper.store import Store
from slrprop.paper.training import fit
from slrprop.parallel import each
from slrprop.plan import Plan, wording
from slrprop.search.judge import Door, Judge, Log
from slrprop.search.path import Choice
from slrprop.search.result import parse_size
from slrprop.search.search import Search
from slrprop.tune import TuneSettings, distilled

TRIES = 4  # evaluations per size that every contender has to share its bytes among the layers
WIDE_TRIES = 2  # the same where layers have thousands of neurons
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


def stored(experiment: Experiment, model: nn.Module) -> tuple[int, int]:
    """Bytes and numbers of a head's treated layers as they are saved."""
    layers = [model.get_submodule(name) for name in experiment.layers]
    tensors = [tensor for layer in layers for tensor in layer.state_dict().values()]
    return sum(tensor.nbytes for tensor in tensors), sum(tensor.numel() for tensor in tensors)


def is_wide(experiment: Experiment, head: nn.Module) -> bool:
    """Whether a treated layer has thousands of neurons on both sides."""
    return max(min(head.get_parameter(f"{name}.weight").shape) for name in experiment.layers) > 2048


class Bench:
    """One trained network: its dense head on the features before it, and what its plans are measured by."""

    def __init__(self, experiment: Experiment, seed: int, data: Dataset, folder: Path) -> None:
        self.experiment, self.seed, self.data = experiment, seed, data
        self.model = trained(experiment, seed, data, folder)
        self.head: DenseHead = self.model.head()
        with torch.no_grad():
            self.x_train, self.x_test = (
                torch.cat([self.model.front(part) for part in x.split(1000)]) for x in (data.x_train, data.x_test)
            )
            self.logits = self.head(self.x_test)
        drawn = torch.randperm(len(self.x_train), generator=torch.Generator().manual_seed(seed))[
            : experiment.calibration
        ]
        self.calibration = Data((self.x_train[drawn], data.y_train[drawn]))
        self.network = TorchNetwork(self.head, self.calibration)
        self.problem = Problem(self.network, self.calibration)
        self.wide = is_wide(experiment, self.head)
        self._onnx: tuple[tempfile.TemporaryDirectory[str], Path, dict[str, str]] | None = None

    def row(
        self, method: str, size: int, plan: Plan | None, model: nn.Module, seconds: float, timed: bool
    ) -> Comparison:
        """Measure a compressed head on the test set; the whole network's file where asked."""
        with torch.no_grad():
            logits = model(self.x_test)
        labels = self.data.y_test
        file_bytes, latency, faster = self.file(plan) if timed and plan is not None else (float("nan"),) * 3
        bytes_now, numbers = stored(self.experiment, model)
        told = "" if plan is None else "; ".join(f"{layer.name}: {wording(layer)}" for layer in plan.layers)
        return Comparison(
            self.experiment.name, self.seed, method, size, bytes_now, numbers,
            100 * float((logits.argmax(1) == labels).double().mean()),
            100 * float((logits.argmax(1) == self.logits.argmax(1)).double().mean()),
            float(nn.functional.cross_entropy(logits.double(), labels)), file_bytes, latency, faster, seconds, told,
        )  # fmt: skip

    def file(self, plan: Plan) -> tuple[float, float, float]:
        """Bytes and latency of the whole network's ONNX file, and how many times faster than the original it is."""
        if self._onnx is None:
            folder = tempfile.TemporaryDirectory()
            path = Path(folder.name) / "original.onnx"
            export_onnx(self.model, path, self.data.x_test[:2])
            network = OnnxNetwork(path, None)
            self._onnx = folder, path, {network.fingerprint(name): name for name in network.names}
        folder, path, names = self._onnx
        of = {name: names[fingerprint(self.head.get_submodule(name).weight)] for name in self.head.names}  # type: ignore[arg-type]
        moved = replace(
            plan,
            layers=tuple(replace(layer, name=of[layer.name]) for layer in plan.layers),
            feeds={of[first]: of[second] for first, second in plan.feeds.items()},
        )
        small = Path(folder.name) / "small.onnx"
        apply(path, moved, small, (self.data.x_test[:16], None))
        times = latencies({"original": path, "small": small}, [self.data.x_test[:1].numpy()], 200)
        return float(small.stat().st_size), times["small"], times["original"] / times["small"]


def plans_of(bench: Bench, contender: Contender, sizes: list[int]) -> Iterator[tuple[int, Plan, float]]:
    """The contender's plan at every size that it can reach, and the seconds that took."""
    layers, start = list(bench.experiment.layers), time.perf_counter()
    if contender.shares is not None:
        known: dict[int, int] = {}
        for size in sizes:
            low, high = 0, SHARES  # the largest share whose plan fits
            while low < high:
                middle = (low + high + 1) // 2
                if middle not in known:  # bytes hang on how many neurons stay, not on what is fitted
                    rough = _by_share(bench, contender.shares, middle, refit=False, sequential=False)
                    known[middle] = stored(bench.experiment, apply(bench.head, rough))[0]
                low, high = (middle, high) if known[middle] <= size else (low, middle - 1)
            if low:
                yield size, _by_share(bench, contender.shares, low), time.perf_counter() - start
        return
    judge = Judge(bench.head, bench.calibration, "agreement")
    search = Search(Door(bench.head, bench.calibration), judge, bench.problem, Log(None), contender.choices)
    search.explore(layers, max(sizes))
    prepared = time.perf_counter() - start
    for size in sizes:
        start = time.perf_counter()
        chosen = search.within(size, WIDE_TRIES if bench.wide else TRIES, each=True)
        if chosen is not None:
            yield size, chosen[0], prepared + time.perf_counter() - start


def _by_share(bench: Bench, choice: Choice, step: int, **more: object) -> Plan:
    """The plan of a method that treats all layers together and keeps ``step`` of ``SHARES`` parts."""
    method, settings = choice
    return plan_problem(bench.problem, method, list(bench.experiment.layers), keep=step / SHARES, **settings, **more)


def narrower(bench: Bench, size: int) -> Comparison | None:
    """A network with fewer neurons between its dense layers, trained from scratch by the same recipe."""
    experiment, data = bench.experiment, bench.data
    layers = {name: bench.network.shape(name) for name in bench.head.names}
    widths = [layers[name][1] for name in bench.head.names[:-1]]
    best = None
    for step in range(1, 257):
        thinner = [max(1, round(width * step / 256)) for width in widths]
        sides = dict(
            zip(
                bench.head.names,
                zip([layers[bench.head.names[0]][0], *thinner], [*thinner, 0], strict=True),
                strict=True,
            )
        )
        if 4 * sum(sides[name][0] * sides[name][1] + sides[name][1] for name in experiment.layers) <= size:
            best = thinner
    if best is None:
        return None
    start = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(bench.seed)
        model = experiment.network(widths=tuple(best))
        fit(model, experiment.recipe, data, f"{experiment.name} narrower {best} seed {bench.seed}")
    with torch.no_grad():
        front = bench.x_test
        bench.x_test = torch.cat([model.front(part) for part in data.x_test.split(1000)])
    row = bench.row(NARROWER, size, None, model.head(), time.perf_counter() - start, False)
    bench.x_test = front
    return replace(row, plan=f"widths {'-'.join(map(str, best))}")


class Benches:
    """Benches by seed, made where they are needed; the last one is kept."""

    def __init__(self, experiment: Experiment, data: Dataset, folder: Path) -> None:
        self.experiment, self.data, self.folder = experiment, data, folder.absolute()
        self._last: Bench | None = None

    def of(self, seed: int) -> Bench:
        """The bench of a seed whose network was trained before."""
        if self._last is None or self._last.seed != seed:
            self._last = None  # frees its memory first
            require_seen(weights_of(self.experiment, seed, self.folder))
            self._last = Bench(self.experiment, seed, self.data, self.folder)
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
    with torch.device("meta"):
        head = experiment.network().head()
    total, wide = stored(experiment, head)[0], is_wide(experiment, head)
    limits = sorted({parse_size(size, total, "--bytes") for size in sizes})
    contenders = [
        (Contender(ORIGINAL, ""), [total]),
        *((contender, limits) for contender in CONTENDERS if chosen(contender) and (contender.wide or not wide)),
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
    with tqdm(total=len(tasks), desc=experiment.name, unit="contender") as bar:
        for (seed, contender, _), count in each(_contend, tasks, shared, workers, cluster):
            new += count
            bar.update()
            bar.set_postfix_str(f"seed {seed}, {contender.name}")
    return new


def _contend(task: tuple[int, Contender, list[int]], benches: Benches, store: Store[Comparison], timed: bool) -> int:
    """Compute the missing rows of a contender on a seed."""
    seed, contender, sizes = task
    count = 0
    for row in _rows(benches.of(seed), contender, sizes, timed and seed == 0):
        store.add(row)
        count += 1
    return count


def _rows(bench: Bench, contender: Contender, sizes: list[int], timed: bool) -> Iterator[Comparison]:
    if contender.name == ORIGINAL:
        yield bench.row(ORIGINAL, sizes[0], Plan(()), bench.head, 0.0, timed)
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
            plan = distilled(bench.network, Data((bench.x_train, None)), plan, TuneSettings(), quiet=True)
        seconds += time.perf_counter() - start
        yield bench.row(contender.name, size, plan, apply(bench.head, plan), seconds, timed)
