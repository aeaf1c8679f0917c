"""The sweep of Garmendia-Orbegozo et al. 2023, section 4: seeds x methods x ranks on the two consecutive layers."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from slrprop.api import apply, plan_problem
from slrprop.checks import require_choice
from slrprop.measure import file_bytes, measure
from slrprop.methods.slr import CRITERIA
from slrprop.network import TorchNetwork
from slrprop.parallel import each
from slrprop.plan import Plan
from slrprop.progress import Progress
from slrprop.research import require_seen
from slrprop.research.bench import Bench
from slrprop.research.datasets import Dataset
from slrprop.research.experiments import Experiment, train_missing, weights_of
from slrprop.research.store import Store
from slrprop.search.path import LEVELS

ORIGINAL = "original"
AUTO = "auto, "  # the product's own choice at a level, in the bytes that SLR stores at the rank
METHODS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    **{f"slr {criterion}": {"method": "slr", "criterion": criterion} for criterion in CRITERIA},
    "slrprop": {"method": "slrprop"},
}


@dataclass(frozen=True)
class Result:
    """One measured network. ``method`` says the criterion too; metrics in percent on the test set.

    ``compression_rate`` is of the layer before the FRL, ``numbers`` of the whole network, ``seconds`` to plan.
    """

    experiment: str
    seed: int
    method: str
    rank: int
    accuracy: float
    auc: float
    recall: float
    precision: float
    specificity: float
    compression_rate: float
    numbers: int
    bytes: int
    seconds: float


def paper_store(place: Path | str) -> Store[Result]:
    """The rows of the article's sweep."""
    return Store(place, Result, ("experiment", "seed", "method", "rank"))


def methods_of(experiment: Experiment, named: Sequence[str] = ()) -> tuple[str, ...]:
    """What its sweep compares; of that, those that are named if any are.

    Raises:
        SlrpropError: a name is of none.
    """
    every = (*METHODS, *(f"{AUTO}{level}" for level in experiment.levels))
    for name in named:
        require_choice("method", name, every)
    return tuple(method for method in every if method in named or not named)


def _cells(experiment: Experiment, methods: Sequence[str]) -> Iterator[tuple[str, int]]:
    yield ORIGINAL, 0
    for rank in experiment.ranks:
        for method in methods:
            yield method, rank


def planned(bench: Bench, method: str, rank: int) -> Plan:
    """The plan of a method at a rank."""
    if method == ORIGINAL:
        return Plan(())
    return plan_problem(bench.problem, layers=bench.experiment.layers, rank=rank, **METHODS[method])


def measured(bench: Bench, method: str, rank: int, plan: Plan, seconds: float) -> Result:
    """A plan's quality on the whole test set, and the whole network's size."""
    experiment, rate = bench.experiment, 1.0
    before_frl = next((layer for layer in plan.layers if layer.name == experiment.layers[0]), None)
    if before_frl is not None:
        m, n = before_frl.shape
        rate = before_frl.bytes / (4 * m * n) if method.startswith(AUTO) else before_frl.numbers / (m * n)
    found = measure(apply(bench.head, plan), (bench.x_test, bench.data.y_test))
    whole = TorchNetwork(apply(bench.model, plan), None)
    found = replace(found, bytes=file_bytes(whole), numbers=whole.numbers)
    kept = {field.name for field in fields(Result)}
    told = {name: value for name, value in asdict(found).items() if name in kept}
    return Result(experiment.name, bench.seed, method, rank, **told, compression_rate=rate, seconds=seconds)


def run(
    experiment: Experiment, data: Dataset, folder: Path, seeds: int, store: Store[Result],
    workers: int = 1, cluster: str | None = None, methods: Sequence[str] = (),
) -> int:  # fmt: skip
    """Compute every missing row; returns how many were computed.

    Args:
        methods: only these, all if none is named.
        workers: processes, and ``cluster`` a Ray cluster, that share the seeds (:func:`slrprop.parallel.each`).

    Raises:
        SlrpropError: the sweep has no method of that name.
    """
    wanted = methods_of(experiment, methods)
    done, folder = {store.key(result) for result in store.results(experiment.name)}, folder.absolute()
    missing = {
        seed: [cell for cell in _cells(experiment, wanted) if (experiment.name, seed, *cell) not in done]
        for seed in range(seeds)
    }
    tasks = [(seed, cells) for seed, cells in missing.items() if cells]
    train_missing(experiment, [seed for seed, _ in tasks], data, folder, workers, cluster)
    with Progress(total=sum(map(len, missing.values())), desc=experiment.name, unit="row") as bar:
        for (_, cells), _ in each(_sweep, tasks, (experiment, data, folder, store), workers, cluster):
            bar.update(len(cells))
    return int(bar.total)


def _sweep(
    task: tuple[int, list[tuple[str, int]]], experiment: Experiment, data: Dataset, folder: Path, store: Store[Result]
) -> None:
    """Compute the missing rows of a seed."""
    seed, cells = task
    require_seen(weights_of(experiment, seed, folder))
    bench = Bench(experiment, seed, data, folder)
    if (ORIGINAL, 0) not in cells:
        store.require_same(measured(bench, ORIGINAL, 0, Plan(()), 0.0), "accuracy", "recall", "precision")
    of_level: dict[str, dict[int, int]] = {}  # the rank of every size, the stored bytes of SLR
    for method, rank in Progress(cells, desc=f"seed {seed}", unit="row", leave=False):
        if method.startswith(AUTO):
            size = experiment.stored(apply(bench.head, planned(bench, "slr weight", rank)))[0]
            of_level.setdefault(method, {})[size] = rank
            continue
        start = time.perf_counter()
        plan = planned(bench, method, rank)
        store.add(measured(bench, method, rank, plan, time.perf_counter() - start))
    before: tuple[object, list[tuple[int, Plan, float]]] = (
        None,
        [],
    )  # of the last level: the next may differ in tuning only
    for method, ranks in of_level.items():
        level = method.removeprefix(AUTO)
        asked, plans = (LEVELS[level], ranks), list[tuple[int, Plan, float]]()
        for size, plan, seconds in before[1] if before[0] == asked else bench.best(LEVELS[level], sorted(ranks)):
            plans.append((size, plan, seconds))
            start = time.perf_counter()
            plan = bench.tuned(plan) if level == "tuned" else plan
            store.add(measured(bench, method, ranks[size], plan, seconds + time.perf_counter() - start))
        before = asked, plans
