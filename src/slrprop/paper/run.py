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
from slrprop.measure import measure
from slrprop.methods import Problem
from slrprop.methods.slr import CRITERIA
from slrprop.network import TorchNetwork
from slrprop.paper.datasets import Dataset
from slrprop.paper.experiments import Experiment, trained
from slrprop.paper.store import Result, Store

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


def run(experiment: Experiment, data: Dataset, folder: Path, seeds: int, store: Store[Result]) -> int:
    """Compute every missing row; returns how many were computed."""
    done = {store.key(result) for result in store.results(experiment.name)}
    missing = [
        (seed, method, rank)
        for seed in range(seeds)
        for method, rank in _cells(experiment)
        if (experiment.name, seed, method, rank) not in done
    ]
    model, problem, of_seed = experiment.network(), None, None
    for seed, method, rank in tqdm(missing, desc=experiment.name, unit="row"):
        if problem is None or seed != of_seed:
            samples = calibration(experiment, data, seed)
            model, of_seed = trained(experiment, seed, data, folder), seed
            problem = Problem(TorchNetwork(model, samples), samples)
        store.add(measure_cell(experiment, model, problem, data, seed, method, rank))
    return len(missing)
