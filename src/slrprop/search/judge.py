"""Measuring networks on one part of the data: quality, divergence, bytes, latency; kept on disk as it is made."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from slrprop.api import realised
from slrprop.checks import require_choice
from slrprop.data import Batch, Data
from slrprop.errors import SlrpropError
from slrprop.export import export_onnx
from slrprop.files import made_folder, scratch
from slrprop.latency import latencies
from slrprop.losses import check_labels, goal_of, loss_point, rows_of
from slrprop.network import OnnxNetwork, open_network
from slrprop.network.onnx_file import OnnxFile
from slrprop.plan import Plan
from slrprop.storage import size_of

METRICS = ("accuracy", "agreement", "squared_error")
LONGEST = "x" * 245 + ".onnx"  # with .data the longest name a file can have


def interval_of(
    differences: Tensor, binary: bool, errors: float = 1.96, count: int | None = None
) -> tuple[float, float]:
    """95 % interval of the mean paired difference (p,), in the metric's unit: ``errors`` standard errors on each side.

    For percentages of right answers: Agresti and Min, Statistics in Medicine 24, 2005 (half an observation added to
    each cell), which does not collapse where both networks agree. Otherwise the normal interval.

    Args:
        count: of how many samples like these it is to be; None: of these.
    """
    n = count or len(differences)
    if not binary:
        mean, deviation = float(differences.mean()), float(differences.std()) if len(differences) > 1 else math.inf
        half = errors * deviation / math.sqrt(n)
        return mean - half, mean + half
    lost, won = (n * float(side.double().mean()) for side in (differences > 0, differences < 0))
    mean = (lost - won) / (n + 2)
    half = errors * math.sqrt(max(lost + won + 1 - (lost - won) ** 2 / (n + 2), 0.0)) / (n + 2)
    return 100 * (mean - half), 100 * (mean + half)


class Judge:
    """Measures networks on one part of the data against the original's outputs there."""

    def __init__(
        self,
        model: Any,
        part: Data,
        metric: str | None,
        own: Callable[[Any], float] | None = None,
        lower_is_better: bool = False,
    ) -> None:
        self.own, self.part = own, part
        self.network = open_network(model, part)
        digest, outputs, targets = hashlib.sha256(), [], []
        for flow in self.network.stream((), part):
            outputs.append(rows_of(flow.output))
            targets.append(flow.batch.targets)
            for tensor in (*flow.batch.inputs, *flow.batch.named.values(), flow.batch.targets, outputs[-1]):
                if isinstance(tensor, Tensor):
                    digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self.original = torch.cat(outputs)
        self.fingerprint = digest.hexdigest()
        labelled = all(target is not None for target in targets)
        self.targets = torch.cat([target for target in targets if target is not None]) if labelled else None
        self.metric = metric or self._usual()
        require_choice("metric", self.metric, METRICS)
        self.lower_is_better = lower_is_better if own else self.metric == "squared_error"
        if self.metric != "squared_error" and self.original.shape[1] < 2:
            raise SlrpropError(
                f"metric '{self.metric}' needs two outputs or more, and the network has one; use metric='squared_error'"
            )
        if self.metric == "accuracy" and self.targets is None:
            raise SlrpropError("metric 'accuracy' needs labels, and the data has none; use metric='agreement'")

    def _usual(self) -> str:
        if self.own is not None and self.original.shape[1] < 2:
            return "squared_error"  # what the search itself compares outputs by
        if self.targets is not None:
            return "squared_error" if self.targets.is_floating_point() else "accuracy"
        return "agreement" if self.original.shape[1] > 1 else "squared_error"

    def qualities(self, outputs: Tensor) -> Tensor:
        """The metric of every sample (p,): 100 or 0 for right or wrong answers, else the squared error."""
        if self.metric == "squared_error":
            goal = self.original if self.targets is None else goal_of(self.targets, outputs)
            return (outputs - goal).square().sum(1).double()
        right = (
            check_labels(self.targets, outputs)
            if self.metric == "accuracy" and self.targets is not None
            else self.original.argmax(1)
        )
        return 100.0 * (outputs.argmax(1) == right).double()

    def drops(self, outputs: Tensor) -> Tensor:
        """How much worse than the original every sample is (p,)."""
        change = self.qualities(outputs) - self.qualities(self.original)
        return change if self.metric == "squared_error" else -change

    def interval(self, outputs: Tensor, errors: float, count: int | None = None) -> tuple[float, float]:
        """Interval of the drop, NaN where the measure is the user's own: see :func:`interval_of`."""
        if self.own is not None:
            return math.nan, math.nan
        return interval_of(self.drops(outputs), self.metric != "squared_error", errors, count)

    def divergence(self, outputs: Tensor) -> float:
        """Mean KL divergence from the original's outputs; mean squared distance where there are no classes."""
        if self.metric == "squared_error":
            return float(loss_point("squared", outputs, None, self.original).values.double().mean())
        scores, original = self.network.scores(outputs), self.network.scores(self.original)
        return float(loss_point("kl", scores, None, original).values.double().mean())

    def quality(self, model: Any, outputs: Tensor) -> float:
        """The metric of a network with these outputs."""
        if self.own is None:
            return float(self.qualities(outputs).mean())
        if isinstance(model, nn.Module):
            return self._finite(self.own(model))
        with scratch() as folder:
            model.write(folder / "model.onnx")
            return self._finite(self.own(folder / "model.onnx"))

    @staticmethod
    def _finite(value: Any) -> float:
        if not isinstance(value, Real) or not math.isfinite(float(value)):
            raise SlrpropError(f"evaluate must give a finite number, got {value!r}")
        return float(value)

    def outputs(self, model: Any) -> Tensor:
        """The outputs (p x c) of another network on this part."""
        network = open_network(model, None)  # it is only run: what follows what is not looked at
        network.at_once = self.network.at_once
        return torch.cat([rows_of(flow.output) for flow in network.stream((), self.part)])


class Log:
    """What was measured, one JSON line each, on disk before it is used."""

    def __init__(self, folder: Path | None) -> None:
        self.known: dict[str, dict[str, float]] = {}
        self.path = None
        if folder is not None:
            self.path = made_folder(folder, "run folder") / "measured.jsonl"
            try:
                lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
            except OSError as error:
                raise SlrpropError(
                    f"the run folder '{folder}' can't be used ({error.strerror}); name another with run_dir"
                ) from error
            for line in lines:
                with contextlib.suppress(msgspec.MsgspecError):  # a line cut off by a kill
                    self.known |= msgspec.json.decode(line, type=dict[str, dict[str, int | float]])

    def get(self, key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The measurement of that key, made now if it is not known."""
        if key not in self.known:
            self.known[key] = measure()
            if self.path is not None:
                with open(self.path, "a") as file:
                    file.write("\n" + json.dumps({key: self.known[key]}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
        return self.known[key]


class Door:
    """How plans become networks that can be measured: torch modules, or ONNX files in memory."""

    def __init__(self, model: Any, data: Data, integer_products: bool = False, name: str = LONGEST) -> None:
        self.model, self.first, self.integer_products = model, next(iter(data)), integer_products
        external = isinstance(model, (str, Path)) and OnnxFile.open(model).external
        self.name = name if external else "model.onnx"  # which a file tells its size by only where data lie beside it

    def realise(self, plan: Plan) -> Any:
        """The network of a plan, for :func:`slrprop.network.open_network`."""
        return realised(self.model, plan, self.integer_products)

    def size(self, made: Any) -> int:
        """Bytes of the file of a network that :meth:`realise` gave."""
        if isinstance(made, nn.Module):
            return size_of(made)
        with scratch() as folder:
            return made.write(folder / self.name)

    def latencies(self, plans: Mapping[str, Plan], repetitions: int = 50) -> dict[str, float]:
        """Seconds for one sample (one batch, where the file fixes its size) in ONNX Runtime on one thread, interleaved."""
        with scratch() as folder:
            files = {}
            for index, (name, plan) in enumerate(plans.items()):
                files[name] = folder / f"{index}.onnx"
                made = self.realise(plan)
                if isinstance(made, nn.Module):
                    export_onnx(made, files[name], tuple(x[:4] for x in self.first.inputs))
                else:
                    made.write(files[name])
            network = open_network(self.model, None)
            one = Batch(tuple(x[:1] for x in self.first.inputs), {k: v[:1] for k, v in self.first.named.items()}, None)
            feed: Any = [x.numpy() for x in one.inputs]
            if isinstance(network, OnnxNetwork):
                size = network.batch or 1
                feed = {
                    name: np.resize(x, (size, *x.shape[1:])) if x.ndim else x for name, x in network.feed(one).items()
                }
            return latencies(files, feed, repetitions)
