"""The sweep of Garmendia-Orbegozo et al. 2023, section 4: seeds x methods x ranks on the two consecutive layers."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from slrprop.api import apply, plan_problem
from slrprop.data import Data
from slrprop.files import require_seen
from slrprop.measure import measure
from slrprop.methods import Problem
from slrprop.methods.slr import CRITERIA
from slrprop.network import TorchNetwork
from slrprop.paper.datasets import Dataset
from slrprop.paper.experiments import Experiment, train_missing, trained, weights_of
from slrprop.paper.store import Result, Store
from slrprop.parallel import each

ORIGINAL = "original"
METHODS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    **{f"slr {criterion}": {"method": "slr", "criterion": criterion} for criterion in CRITERIA},
    "slrprop": {"method": "slrprop"},
}


def calibration(experiment: Experiment, data: Dataset, seed: int) -> Data:
    """The seed's own calibration samples, drawn from the training set."""
    drawn = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(seed))[: experiment.calibration]
    return Data((data.x_train[drawn], data.y_train[drawn]))


def _cells(experiment: Experiment) -> Iterator[tuple[str, int]]:
    yield ORIGINAL, 0
    for rank in experiment.ranks:
        for method in METHODS:
            yield method, rank


def measure_cell(
    experiment: Experiment, model: nn.Module, problem: Problem, data: Dataset, seed: int, method: str, rank: int
) -> Result:
    """Compress by one method at one rank and measure on the whole test set."""
    start, rate = time.perf_counter(), 1.0
    small = model
    if method != ORIGINAL:
        made = plan_problem(problem, layers=experiment.layers, rank=rank, **METHODS[method])
        small = apply(model, made)
        before_frl = next((layer for layer in made.layers if layer.name == experiment.layers[0]), None)
        if before_frl is not None:
            rate = before_frl.numbers / (before_frl.shape[0] * before_frl.shape[1])
    seconds = time.perf_counter() - start
    found = measure(small, (data.x_test, data.y_test))
    return Result(experiment.name, seed, method, rank, **asdict(found), compression_rate=rate, seconds=seconds)


def run(
    experiment: Experiment, data: Dataset, folder: Path, seeds: int, store: Store[Result],
    workers: int = 1, cluster: str | None = None,
) -> int:  # fmt: skip
    """Compute every missing row; returns how many were computed.

    Args:
        workers: processes, and ``cluster`` a Ray cluster, that share the seeds (:func:`slrprop.parallel.each`).
    """
    done, folder = {store.key(result) for result in store.results(experiment.name)}, folder.absolute()
    missing = {
        seed: [cell for cell in _cells(experiment) if (experiment.name, seed, *cell) not in done]
        for seed in range(seeds)
    }
    tasks = [(seed, cells) for seed, cells in missing.items() if cells]
    train_missing(experiment, [seed for seed, _ in tasks], data, folder, workers, cluster)
    with tqdm(total=sum(map(len, missing.values())), desc=experiment.name, unit="row") as bar:
        for (_, cells), _ in each(_sweep, tasks, (experiment, data, folder, store), workers, cluster):
            bar.update(len(cells))
    return int(bar.total)


def _sweep(
    task: tuple[int, list[tuple[str, int]]], experiment: Experiment, data: Dataset, folder: Path, store: Store[Result]
) -> None:
    """Compute the missing rows of a seed."""
    seed, cells = task
    require_seen(weights_of(experiment, seed, folder))
    samples, model = calibration(experiment, data, seed), trained(experiment, seed, data, folder)
    problem = Problem(TorchNetwork(model, samples), samples)
    for method, rank in tqdm(cells, desc=f"seed {seed}", unit="row", leave=False):
        store.add(measure_cell(experiment, model, problem, data, seed, method, rank))
