"""Measuring networks on one part of the data: quality, divergence, bytes, latency; kept on disk as it is made."""

import contextlib
import hashlib
import inspect
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from slrprop.api import realised
from slrprop.checks import require_choice
from slrprop.data import Data, content
from slrprop.errors import SlrpropError
from slrprop.export import export_onnx
from slrprop.files import made_folder, require_regular, scratch
from slrprop.latency import latencies
from slrprop.losses import IGNORED, check_labels, goal_of, loss_point, require_labels, rows_of
from slrprop.metrics import LABELLED, LOWER, METRICS, NUMBERS, SOME, Score, interval_between, score
from slrprop.network import Network, OnnxNetwork, open_network
from slrprop.network.onnx.file import OnnxFile
from slrprop.plan import Plan
from slrprop.storage import size_of

LONGEST = "x" * 245 + ".onnx"  # with .data the longest name a file can have


class Judge:
    """Measures networks on one part of the data against the original's outputs there.

    ``metric`` is taken for the ``reason`` told; ``notes`` say what is odd about the samples or the original on them.

    Args:
        own: the user's measure instead of the metric; see ``evaluate`` of :func:`slrprop.compress`.
    """

    def __init__(
        self,
        model: Any,
        part: Data,
        metric: str | None,
        own: Callable[..., Any] | None = None,
        lower_is_better: bool = False,
    ) -> None:
        self.own, self.part = own, part
        self.network = open_network(model, part)
        digest, outputs, targets, samples, first = hashlib.sha256(), [], [], [], None
        count, constant = 0, True
        for flow in self.network.stream((), part):
            rows, batch = rows_of(flow.output), flow.batch
            values = batch.values().items()
            inputs = [x.movedim(batch.axes.get(key, 0), 0) for key, x in values if isinstance(x, Tensor)]
            size = batch.samples  # rows of no sample stand for themselves
            size = size if len(rows) % size == 0 else len(rows)
            samples.append(count + torch.arange(len(rows), device=rows.device) // (len(rows) // size))
            outputs.append(rows)
            targets.append(_by_row(batch.targets, rows))
            count, first = count + size, inputs if first is None else first
            constant &= len(inputs) == len(first) and all(map(_repeats, inputs, first))
            for tensor in (*batch.values().values(), batch.targets, rows):
                if isinstance(tensor, np.ndarray):
                    digest.update(repr(tensor.tolist()).encode())
                    constant = False
                elif isinstance(tensor, Tensor):
                    digest.update(content(tensor))
        self.original, sample = torch.cat(outputs), torch.cat(samples)
        labelled = all(target is not None for target in targets)
        self.targets = torch.cat([target for target in targets if target is not None]) if labelled else None
        self.fingerprint = digest.hexdigest()
        self.metric, self.reason = (metric, "") if metric else self._usual()
        require_choice("metric", self.metric, METRICS)
        self.lower_is_better = lower_is_better if own else self.metric in LOWER
        if self.metric not in NUMBERS and self.original.shape[1] < 2:
            raise SlrpropError(
                f"metric '{self.metric}' needs two outputs or more, and the network has one; use metric='squared_error'"
            )
        if self.metric in LABELLED and self.targets is None:
            raise SlrpropError(f"metric '{self.metric}' needs labels, and the data has none; use metric='agreement'")
        self.counted: Any = slice(None)  # rows whose label is not to be ignored
        self.labels: Tensor | None = None
        if self.targets is not None and ((self.metric in LABELLED and own is None) or self._are_labels()):
            self.labels = check_labels(self.targets, self.original)
            self.counted = self.labels != IGNORED
            require_labels(int(self.counted.sum()))
            self.labels = self.labels[self.counted]
        self.original = self.original[self.counted]
        self.sample = sample[self.counted].unique(return_inverse=True)[1]
        self.samples = int(self.sample.max()) + 1
        if self.targets is None and self.network.reading is not None:  # what the search minimises is what is judged
            told = (self.network.reading.embedding or self.metric) if self.metric in NUMBERS else ""
            self.network.reading = self.network.reading._replace(embedding=told)
        self.change = "growth" if self.lower_is_better else "drop"  # for the worse
        self.notes = [f"all {count:,} samples are the same"] if constant and count > 1 else []
        self.notes += self._unfitting()

    def _are_labels(self) -> bool:
        """Whether the targets are a class of the network, or none, for each row."""
        (rows, classes), targets = self.original.shape, self.targets
        if targets is None or targets.is_floating_point() or targets.shape != (rows,) or classes < 2:
            return False
        valid = targets[targets.long() != IGNORED]
        return len(valid) > 0 and int(valid.min()) >= 0 and int(valid.max()) < classes

    def _usual(self) -> tuple[str, str]:
        """The metric where none was asked for, and why."""
        one = self.original.shape[1] < 2
        if self.targets is not None and not (self.own and one):
            if self.targets.is_floating_point():
                return "squared_error", "the data has real targets"
            return "accuracy", "the data has labels"
        if one:
            return "squared_error", "the network has one output"  # what the search itself compares outputs by
        why = "" if self.network.reading is None else self.network.reading.embedding
        if not why:
            return "agreement", "the data has no labels"
        return "cosine", (
            f"the data has no labels and {why}, so that they are an embedding more likely than classes; "
            "if they are classes, ask for the metric agreement"
        )

    def _unfitting(self) -> list[str]:
        """What speaks against the labels or targets being those that the original was trained for."""
        if self.labels is not None:
            counts, right = self.labels.bincount(), self.score("accuracy", self.original).value / 100
            most, n = float(counts.max()) / len(self.labels), len(self.labels)
            if most == 1:
                return [f"all labels are {int(self.labels[0])}, so that they tell little"]
            if right <= most + 2 * (most * (1 - most) / n) ** 0.5:
                return [
                    f"the original is right on {100 * right:.1f} % of the labels, and always naming the most frequent class would be "
                    f"on {100 * most:.1f} %; check that labels and inputs fit the network"
                ]
        targets = self.targets
        if targets is None or targets.shape != self.original.shape or bool((targets == targets[:1]).all()):
            return []
        explained = self.score("r2", self.original).value
        told = f"the original predicts the targets no better than their mean would (r2 {explained:.2f}); check that targets and inputs fit the network"
        return [told] if explained <= 0 else []

    def score(self, name: str, outputs: Tensor) -> Score:
        """A metric of a network with these outputs (p x c)."""
        if name in NUMBERS:
            real = self.targets is not None and (self.targets.is_floating_point() or name != "cosine")
            return score(name, outputs, goal_of(self.targets, outputs) if real else self.original, self.sample)  # type: ignore[arg-type]
        if name == "auc":
            outputs = self.network.scores(outputs).double().softmax(1)
        goal = self.original.argmax(1) if name == "agreement" else self.labels
        assert goal is not None
        return score(name, outputs, goal, self.sample)

    def judged(self, model: Any, outputs: Tensor) -> Score:
        """The metric, or the user's measure, of a network with these outputs."""
        if self.own is None:
            return self.score(self.metric, outputs)
        if isinstance(model, nn.Module):
            return self._owned(model)
        with scratch() as folder:
            model.write(folder / "model.onnx")
            return self._owned(folder / "model.onnx")

    def _owned(self, model: nn.Module | Path) -> Score:
        """What the user's measure says: one number, or one a sample."""
        assert self.own is not None
        told = takes_data(self.own)
        given = self.own(model, self.part) if told else self.own(model)
        try:
            values = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            values = torch.tensor(math.nan)
        unfit = values.ndim > 1 or (values.ndim == 1 and len(values) != (self.samples if told else max(len(values), 1)))
        if isinstance(given, bool) or unfit or not torch.isfinite(values).all():
            what = f"values of shape {tuple(values.shape)}" if values.ndim else repr(given)[:80]
            raise SlrpropError(f"evaluate must give a finite number, or one for each of the samples, got {what}")
        if not values.ndim:
            return Score(float(values))
        mean, answers = values.mean(), len(values.unique()) <= 2  # right or wrong
        return Score(float(mean), (values - mean) / len(values), float(values.abs().max()) if answers else 0.0)

    def interval(
        self, before: Score, after: Score, errors: float = SOME, count: int | None = None
    ) -> tuple[float, float]:
        """Interval of how much worse ``after`` is, NaN where only the values are known: see :func:`slrprop.metrics.interval_of`."""
        low, high = interval_between(before, after, errors, count)
        return (low, high) if self.lower_is_better else (0.0 - high, 0.0 - low)

    def beside(self, outputs: Tensor) -> dict[str, tuple[float, float]]:
        """What the mean over samples may hide where one class has at least twice the labels of another: before and after."""
        if self.labels is None:
            return {}
        counts = self.labels.bincount()
        names = ("balanced_accuracy", "worst_recall") if counts.max() >= 2 * counts[counts > 0].min() else ()
        return {
            name: (self.score(name, self.original).value, self.score(name, outputs).value)
            for name in names
            if name != self.metric
        }

    def divergence(self, outputs: Tensor) -> float:
        """Mean KL divergence from the original's outputs; mean squared distance where there are no classes."""
        if self.metric in NUMBERS:
            return float(loss_point("squared", outputs, None, self.original).values.double().mean())
        scores, original = self.network.scores(outputs), self.network.scores(self.original)
        return float(loss_point("kl", scores, None, original).values.double().mean())

    @property
    def noise(self) -> float:
        """A divergence that rounding alone may make."""
        return 1e-10 * float(self.original.square().mean()) if self.metric in NUMBERS else 1e-7

    def outputs(self, model: Any) -> Tensor:
        """The outputs (p x c) of another network on this part, of the rows that count."""
        if isinstance(self.network, OnnxNetwork):
            network: Network = self.network.with_file(model)
        else:
            # it is only run: what follows what is not looked at
            network = open_network(model, None, self.network.reading)
            network.at_once = self.network.at_once
        return torch.cat([rows_of(flow.output) for flow in network.stream((), self.part)])[self.counted]


def _repeats(x: Tensor, first: Tensor) -> bool:
    """Whether all samples of an input are the first one of another batch of it."""
    return x.ndim == 0 or (x.shape[1:] == first.shape[1:] and bool((x == first[:1]).all()))


def _by_row(targets: Tensor | None, rows: Tensor) -> Tensor | None:
    """Targets as rows (p x c) are where there is one for each number, as (p,) where there is one for each row, else as they are."""
    if targets is None or targets.numel() not in (len(rows), rows.numel()):
        return targets
    return targets.reshape(rows.shape if targets.is_floating_point() and targets.numel() == rows.numel() else -1)


def takes_data(own: Callable[..., Any]) -> bool:
    """Whether a measure takes the samples beside the network: a second argument without a default."""
    try:
        given = inspect.signature(own).parameters.values()
    except (TypeError, ValueError):  # a function that does not tell
        return False
    must = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in must and one.default is one.empty for one in given) > 1


class Log:
    """What was measured, one JSON line each, on disk before it is used."""

    def __init__(self, folder: Path | None) -> None:
        self.known: dict[str, dict[str, float]] = {}
        self.path = None
        if folder is not None:
            self.path = made_folder(folder, "run folder") / "measured.jsonl"
            try:
                require_regular(self.path)
                lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
            except OSError as error:
                raise SlrpropError(
                    f"the run folder '{folder}' can't be used ({error.strerror}); name another with run_dir"
                ) from error
            for line in lines:
                with contextlib.suppress(msgspec.MsgspecError, RecursionError):  # a line cut off by a kill, or foreign
                    for key, values in msgspec.json.decode(line, type=dict[str, dict[str, int | float]]).items():
                        if values.pop("crc", None) == self._crc(key, values):
                            self.known[key] = values

    @staticmethod
    def _crc(key: str, values: dict[str, float]) -> int:
        return zlib.crc32(json.dumps([key, values], sort_keys=True).encode())

    def get(self, key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The measurement of that key, made now if it is not known."""
        if key not in self.known:
            self.known[key] = measure()
            if self.path is not None:
                line = {key: self.known[key] | {"crc": self._crc(key, self.known[key])}}
                with open(self.path, "a") as file:
                    file.write("\n" + json.dumps(line) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
        return self.known[key]


class Door:
    """How plans become networks that can be measured: torch modules, or ONNX files in memory."""

    def __init__(self, model: Any, data: Data, integer_products: bool = False, name: str = LONGEST) -> None:
        self.model, self.first, self.integer_products = model, next(iter(data)), integer_products
        external = isinstance(model, OnnxFile) and model.external
        self.name = name if external else "model.onnx"  # which a file tells its size by only where data lie beside it

    def realise(self, plan: Plan, sharing: bool = False) -> Any:
        """The network of a plan, for :func:`slrprop.network.open_network`; ``sharing`` as in :func:`slrprop.api.realised`."""
        return realised(self.model, plan, self.integer_products, sharing)

    def size(self, made: Any) -> int:
        """Bytes of the file of a network that :meth:`realise` gave."""
        if isinstance(made, nn.Module):
            return size_of(made)
        size: int = made.size(self.name)
        return size

    def latencies(self, plans: Mapping[str, Plan], repetitions: int = 50) -> dict[str, float]:
        """Seconds for one sample (one batch, where the file fixes its size) in ONNX Runtime on one thread, interleaved."""
        with scratch() as folder:
            files = {}
            for index, (name, plan) in enumerate(plans.items()):
                files[name] = folder / f"{index}.onnx"
                made = self.realise(plan)
                if isinstance(made, nn.Module):
                    export_onnx(made, files[name], self.first.take(slice(4)).inputs, batch_axis=self.first.axes)
                else:
                    made.write(files[name])
            network = open_network(self.model, None)
            one = self.first.take([0] * (network.fixed_batch(self.first) or 1))
            feed: Any = [x.numpy() for x in one.inputs]
            if isinstance(network, OnnxNetwork):
                feed = network.feed(one)
            return latencies(files, feed, repetitions)
