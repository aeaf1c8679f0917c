"""A trained network of an experiment: its head on the features before it, and the plans that a search finds for it."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from slrprop.data import Data
from slrprop.files import replacing
from slrprop.methods import Problem
from slrprop.network import TorchNetwork
from slrprop.plan import Plan
from slrprop.research.datasets import Dataset
from slrprop.research.experiments import Experiment, trained, weights_of
from slrprop.research.training import digest
from slrprop.search.judge import Door, Judge, Log
from slrprop.search.path import Choice
from slrprop.search.shares import Shares
from slrprop.search.trials import Trials
from slrprop.tune import TuneSettings, distilled

PART = 500  # images that pass the front at once


class Bench:
    """The head of a network trained from a seed, on the features that the rest gives.

    ``calibration`` is the seed's own draw of training samples. The features of convolutions are kept in ``folder``.
    """

    def __init__(self, experiment: Experiment, seed: int, data: Dataset, folder: Path) -> None:
        self.experiment, self.seed, self.data = experiment, seed, data
        self.model = trained(experiment, seed, data, folder)
        self.head = self.model.head()
        self.x_train, self.x_test = self._features(weights_of(experiment, seed, folder))
        self.logits = in_parts(self.head, self.x_test)
        drawn = torch.randperm(len(self.x_train), generator=torch.Generator().manual_seed(seed))
        drawn = drawn[: experiment.calibration]
        self.calibration = Data((self.x_train[drawn], data.y_train[drawn]))
        self.network = TorchNetwork(self.head, self.calibration)
        self.problem = Problem(self.network, self.calibration)

    def _features(self, weights: Path) -> tuple[Tensor, Tensor]:
        """What comes before the head of all training and test samples."""
        if self.head is self.model:
            return self.data.x_train, self.data.x_test
        if not self.experiment.recipe.convolutional:
            return in_parts(self.model.front, self.data.x_train), in_parts(self.model.front, self.data.x_test)
        path, made_by = weights.with_suffix(".features"), digest(weights)
        if path.exists():
            with safe_open(path, "pt") as file:
                known = (file.metadata() or {}).get("weights") == made_by
            if known:
                found = load_file(path)
                return found["train"], found["test"]
        both = {"train": self.data.x_train, "test": self.data.x_test}
        found = {which: in_parts(self.model.front, x) for which, x in both.items()}
        with replacing(path) as part:
            part.write_bytes(save(found, {"weights": made_by}))
        return found["train"], found["test"]

    def best(self, choices: Sequence[Choice], sizes: Sequence[int]) -> Iterator[tuple[int, Plan, float]]:
        """The plan that the search finds at every size (stored bytes of the treated layers) it can reach, and the seconds."""
        start = time.perf_counter()
        judge = Judge(self.head, self.calibration, "agreement")
        trials = Trials(Door(self.head, self.calibration), judge, Log(None))
        shares = Shares(trials, self.problem, tuple(choices))
        shares.explore(list(self.experiment.layers), max(sizes))
        prepared = time.perf_counter() - start
        for size in sizes:
            start = time.perf_counter()
            chosen = shares.within(size, self.experiment.tries, every=True)
            if chosen is not None:
                yield size, chosen[0], prepared + time.perf_counter() - start

    def tuned(self, plan: Plan) -> Plan:
        """The plan distilled on the training inputs."""
        return distilled(self.network, Data((self.x_train, None)), plan, TuneSettings(), quiet=True)


def in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a function of samples gives, without gradients, so many at once as memory holds."""
    with torch.no_grad():
        return torch.cat([function(part) for part in x.split(PART)])
