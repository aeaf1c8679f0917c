"""Regressions of a network's layers from what they see of a data set, all sums in float64, streamed.

Inputs may come from a network whose earlier layers are compressed already; what the layer should then give is still the
original network's pre-activation.
"""

import itertools
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from scipy.linalg.lapack import dtpttr, dtrttp
from torch import Tensor

from slrprop.data import Data
from slrprop.errors import SlrpropError
from slrprop.fit.pairs import Compressed, Pairs
from slrprop.fit.regression import DAMPING, Regression, level
from slrprop.fit.statistics import Counts, Moments, moments_of, summed_of
from slrprop.linalg import mirrored
from slrprop.memory import bound, give_back
from slrprop.network.base import Network
from slrprop.operators import Lookup

ROUNDING = 1e-12  # relative, of sums in float64
METRIC_DAMPING = 0.05  # of the outputs' metric, times its mean diagonal
METRIC_ROWS = 2048  # samples that the metric is averaged over
METRIC_OUTPUTS = 8192  # of a layer; of more, all weigh alike: the metric would take gigabytes, and minutes to factorise
UNSEEN = 1e-3  # of how often a row of an embedding is read in the mean: what a row counts that no sample reads
PROBES = 16  # random directions that stand for more classes than that


class Calibration:
    """Regressions of a network's layers on one data set; what was streamed once is kept where it fits.

    Args:
        known: moments of layers of the original network (:func:`slrprop.fit.statistics.moments`), which are not summed again.
    """

    def __init__(self, network: Network, data: Data, known: Mapping[str, Moments | Counts] | None = None) -> None:
        self.network, self.data, self._known = network, data, known or {}
        self.pairs = Pairs(network, data)
        self._metrics: dict[str, np.ndarray | None] = {}  # packed triangles
        # of layers whose inputs are the original ones, the last ones that fit
        self._first: dict[tuple[str, bool], Regression] = {}
        # layers asked for in this order, whose moments are summed together, as many as fit; those before are done with
        self._coming: tuple[str, ...] = ()

    def prepare(self, names: tuple[str, ...], weighted: bool = True, alone: bool = True) -> None:
        """Measure all that the named layers of the original network need at once, where each would take a run of its own.

        Args:
            alone: each is asked for with nothing compressed before it; else its sums are of use to none but the first, and made only where
                they take little room.
        """
        some = names if len(names) > 1 else ()  # of a file's chain all numbers are read
        many = tuple(name for name in some if self.network.chain(name) is None and (name, weighted) not in self._first)
        if len(many) < 2:
            return
        if weighted:
            self._measure_metrics(tuple(name for name in many if name not in self._metrics))
        outputs: dict[str, list[Tensor]] | None = {} if self.pairs.prepare(many) else None
        fit = sum(map(self._size, many)) <= bound() // 2
        if alone or fit:
            self._coming = many
            self._measure_next(many[0], weighted, outputs)
            self._coming = () if fit else many
            self.pairs.outputs |= outputs or {}
        else:
            self._coming, self._first = (), {}

    def _measure_next(self, name: str, weighted: bool, outputs: dict[str, list[Tensor]] | None = None) -> None:
        """The regressions of a layer and of those to come that fit into memory beside it, in one run."""
        group = self._coming[self._coming.index(name) :]
        sizes = itertools.accumulate(map(self._size, group))
        group = tuple(other for other, size in zip(group, sizes, strict=True) if size <= bound() // 2) or group[:1]
        self._forget(sum(map(self._size, group)))
        found = moments_of(self.network, group, self.data, False, outputs)
        for other in group:
            summed = found.pop(other)
            if summed.count:
                self._made(other, {}, weighted, self._known.get(other, summed))

    def _forget(self, size: int) -> None:
        """Let go of the oldest regressions until there is room for such a size."""
        while self._first and size + sum(self._size(name) for name, _ in self._first) > bound() // 2:
            del self._first[next(iter(self._first))]

    def regression(self, name: str, compressed: Mapping[str, Compressed], weighted: bool = True) -> Regression:
        """The regression of a layer, given what the layers before it compute by now.

        Args:
            weighted: measure the outputs' metric; without it all outputs weigh alike.

        Raises:
            SlrpropError: the layer is not called on this data.
        """
        siblings = self.network.siblings(name)
        before = {key: value for key, value in compressed.items() if key not in siblings}
        if not before and name in self._coming:
            done = self._coming[: self._coming.index(name)]
            self._first = {key: task for key, task in self._first.items() if key[0] not in done}
        if not before and (name, True) in self._first:
            return self._first[name, True] if weighted else self._first[name, True].unweighted
        if not before and (name, weighted) in self._first:
            return self._first[name, weighted]
        summed = self._known.get(name) if not before else None
        if summed is None and not before and name in self._coming:
            self._measure_next(name, weighted)
            if (name, weighted) in self._first:
                return self._first[name, weighted]
        if summed is None:
            self._forget(self._size(name))
            if weighted:
                self._metric(name)  # while nothing else of the layer is there
            summed = summed_of(self.network, name, bool(before))
            for x, z in self.pairs.of(name, before):
                summed.add(x, z)
        if not summed.count:
            raise SlrpropError(f"layer '{name}' saw no sample of the calibration data; give data that reaches it")
        return self._made(name, before, weighted, summed)

    def _made(self, name: str, before: dict[str, Compressed], weighted: bool, summed: Moments | Counts) -> Regression:
        """The regression out of moments; kept where nothing is compressed before."""
        self.network.forget()
        known = self.pairs.original(name)
        weight = target = known.weight
        if isinstance(summed, Counts):
            read = summed.rows / summed.count
            mean, target_mean = torch.zeros_like(read), torch.zeros_like(known.bias)
            covariance = read + UNSEEN * read.mean()
        else:
            mean, target_mean = summed.mean, summed.target_mean
            covariance = summed.square.div_(summed.count)
            varying = covariance.diagonal() > 0
            # what rounding left of constant inputs is not below zero
            floor = ROUNDING * covariance.diagonal().mean().clamp_min(0) + (ROUNDING * mean).square().mean()
            covariance.diagonal().add_(floor)
            if summed.cross is not None and before:
                pull = DAMPING * level(covariance)
                at = varying.nonzero().flatten()
                left = covariance[at[:, None], at]  # removed neurons give nothing: their weights stay
                left.diagonal().add_(pull)
                right = summed.cross[varying] / summed.count + pull * weight[varying]
                target = weight.clone()
                target[varying] = torch.cholesky_solve(right, torch.linalg.cholesky(left))
        metric = self._metric(name) if weighted else None
        found = Regression(
            name, weight, target, known.bias, mean, covariance, target_mean, metric, None if metric is None else torch.linalg.cholesky(metric),
            self.network.activation(name) == "relu", partial(self.pairs.samples, name, before), self.network.operator(name),
        )  # fmt: skip
        if not before:
            self._first[name, weighted] = found
        return found

    def _size(self, name: str) -> int:
        """Bytes of a layer's regression with what it computes once."""
        m, n = self.network.shape(name)
        inputs = m if isinstance(self.network.operator(name), Lookup) else 3 * m * m
        return 8 * (inputs + 2 * m * n + 2 * n * n)

    def forget(self) -> None:
        """Let go of the regressions that were made in turn because all do not fit."""
        if self._coming:
            self._coming, self._first = (), {}
            give_back()

    def rest(self) -> None:
        """Let go of the batches that are on their way through the network."""
        self.pairs.rest()

    def _metric(self, name: str) -> Tensor | None:
        """The damped Gauss-Newton metric (n x n) of a layer's outputs.

        None where the outputs' gradient can't be had or is zero, or outputs are more than ``METRIC_OUTPUTS``.
        """
        if name not in self._metrics:
            self._measure_metrics((name,))
        packed = self._metrics[name]
        if packed is None:
            return None
        return mirrored(torch.from_numpy(dtpttr(self.network.shape(name)[1], packed)[0])).T  # rows lie together again

    def _measure_metrics(self, names: tuple[str, ...]) -> None:
        self._metrics |= dict.fromkeys(names)
        names = tuple(name for name in names if self.network.shape(name)[1] <= METRIC_OUTPUTS)
        if not names:
            return
        totals: dict[str, Tensor] = {}
        counts = dict.fromkeys(names, 0)
        for turn, found in self.network.gradients(names, self.data, PROBES):
            if turn == 0 and totals and min(counts[name] for name in totals) >= METRIC_ROWS:
                break
            for name, gradient in found.items():
                gradient = gradient.double().cpu()
                square = totals.setdefault(name, gradient.new_zeros(gradient.shape[1], gradient.shape[1]))
                square.addmm_(gradient.T, gradient)
                counts[name] += len(gradient) if turn == 0 else 0
        for name in names:
            if name in totals:
                total = totals.pop(name) / max(counts[name], 1)
                mean = total.diagonal().mean()
                if mean > 0:
                    total.diagonal().add_(METRIC_DAMPING * mean)
                    self._metrics[name] = dtrttp(total.numpy())[0]
        give_back()
