"""Regressions of a network's layers from what they see of a data set, all sums in float64, streamed.

Inputs may come from a network whose earlier layers are compressed already; what the layer should then give is still the
original network's pre-activation.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from slrprop.data import Data
from slrprop.errors import SlrpropError
from slrprop.network.base import Network
from slrprop.pairs import Compressed, Pairs
from slrprop.regression import DAMPING, Regression, level
from slrprop.statistics import Moments, moments_of

ROUNDING = 1e-12  # relative, of sums in float64
METRIC_DAMPING = 0.05  # of the outputs' metric, times its mean diagonal
METRIC_ROWS = 2048  # samples that the metric is averaged over
METRIC_OUTPUTS = 8192  # of a layer; of more, all weigh alike: the metric would take gigabytes, and minutes to factorise
PROBES = 16  # random directions that stand for more classes than that


class Calibration:
    """Regressions of a network's layers on one data set; what was streamed once is kept where it fits.

    Args:
        known: moments of layers of the original network (:func:`slrprop.statistics.moments`), which are not summed again.
    """

    def __init__(self, network: Network, data: Data, known: Mapping[str, Moments] | None = None) -> None:
        self.network, self.data, self._known = network, data, known or {}
        self.pairs = Pairs(network, data)
        self._metrics: dict[str, tuple[Tensor, Tensor] | None] = {}
        self._first: dict[tuple[str, bool], Regression] = {}  # of layers whose inputs are the original ones

    def prepare(self, names: tuple[str, ...], weighted: bool = True) -> None:
        """Measure all that the named layers of the original network need at once, where each would take a run of its own."""
        many = tuple(name for name in names if self.network.chain(name) is None and (name, weighted) not in self._first)
        if len(many) < 2:
            return
        if weighted:
            self._measure_metrics(many)
        outputs: dict[str, list[Tensor]] | None = {} if self.pairs.prepare(many) else None
        for name, summed in moments_of(self.network, many, self.data, False, outputs).items():
            if summed.count:
                self._made(name, {}, weighted, self._known.get(name, summed))
        self.pairs.outputs |= outputs or {}

    def regression(self, name: str, compressed: Mapping[str, Compressed], weighted: bool = True) -> Regression:
        """The regression of a layer, given what the layers before it compute by now.

        Args:
            weighted: measure the outputs' metric; without it all outputs weigh alike.

        Raises:
            SlrpropError: the layer is not called on this data.
        """
        siblings = self.network.siblings(name)
        before = {key: value for key, value in compressed.items() if key not in siblings}
        if (name, weighted) in self._first and not before:
            return self._first[name, weighted]
        summed = self._known.get(name) if not before else None
        if summed is None:
            summed = Moments(*self.network.shape(name), crossed=bool(before))
            for x, z in self.pairs.of(name, before):
                summed.add(x, z)
        if not summed.count:
            raise SlrpropError(f"layer '{name}' saw no sample of the calibration data; give data that reaches it")
        return self._made(name, before, weighted, summed)

    def _made(self, name: str, before: dict[str, Compressed], weighted: bool, summed: Moments) -> Regression:
        """The regression out of moments; kept where nothing is compressed before."""
        weight, bias, _ = self.pairs.original(name)
        mean, target_mean = summed.mean, summed.target_mean
        square = summed.square
        covariance = square / summed.count
        # what rounding left of constant inputs is not below zero
        floor = ROUNDING * covariance.diagonal().mean().clamp_min(0) + (ROUNDING * mean).square().mean()
        covariance.diagonal().add_(floor)
        target = weight
        if summed.cross is not None and before:
            varying = square.diagonal() > 0  # removed neurons give nothing: their weights stay
            pull = DAMPING * level(covariance)
            left = covariance[varying][:, varying] + pull * torch.eye(int(varying.sum()), dtype=torch.float64)
            right = summed.cross[varying] / summed.count + pull * weight[varying]
            target = weight.clone()
            target[varying] = torch.cholesky_solve(right, torch.linalg.cholesky(left))
        metric, root = (self._metric(name) if weighted else None) or (None, None)
        relu = self.network.activation(name) == "relu"
        samples = partial(self.pairs.samples, name, before)
        found = Regression(name, weight, target, bias, mean, covariance, target_mean, metric, root, relu, samples)
        if not before:
            self._first[name, weighted] = found
        return found

    def rest(self) -> None:
        """Let go of the batches that are on their way through the network."""
        self.pairs.rest()

    def _metric(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The damped Gauss-Newton metric (n x n) of a layer's outputs and its lower Cholesky factor.

        None where the outputs' gradient can't be had or is zero, or outputs are more than ``METRIC_OUTPUTS``.
        """
        if name not in self._metrics:
            self._measure_metrics((name,))
        return self._metrics[name]

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
                total = totals[name] / max(counts[name], 1)
                mean = total.diagonal().mean()
                if mean > 0:
                    total.diagonal().add_(METRIC_DAMPING * mean)
                    self._metrics[name] = total, torch.linalg.cholesky(total)
