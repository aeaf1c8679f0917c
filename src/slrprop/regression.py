"""The problem every data-aware method solves: a layer's inputs, what its outputs should be, and which outputs matter.

Inputs may come from a network whose earlier layers are compressed already; what the layer should then give is still the
original network's pre-activation. All sums are in float64, streamed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from slrprop.data import Data
from slrprop.errors import SlrpropError
from slrprop.factors import Factors
from slrprop.linalg import balanced, principal, projected
from slrprop.network import Lockstep, in_lockstep
from slrprop.network.base import Network
from slrprop.network.chain import ACTIVATIONS
from slrprop.statistics import Moments, moments_of

DAMPING = 1e-4  # pull towards the original weight, times the mean variance of the inputs
ROUNDING = 1e-12  # relative, of sums in float64
METRIC_DAMPING = 0.05  # of the outputs' metric, times its mean diagonal
METRIC_ROWS = 2048  # samples that the metric is averaged over
METRIC_OUTPUTS = 8192  # of a layer; of more, all weigh alike: the metric would take gigabytes, and minutes to factorise
SELECTION_DAMPING = 1e-3
ROUNDING_DAMPING = 1e-2  # of the covariance, when errors of rounding are passed on
PROBES = 16  # random directions that stand for more classes than that
KEPT_BYTES = 1 << 30  # of a layer's inputs
SAMPLE_ROWS = 4096


def level(matrix: Tensor) -> float:
    """The mean of a covariance's diagonal, what damping is measured by; 1 where all is zero."""
    return float(matrix.diagonal().mean()) or 1.0


class Spread(NamedTuple):
    """How errors of one row are passed on to the others: rows by falling variance, and the inverse's Cholesky factor."""

    order: Tensor
    upper: Tensor

    @classmethod
    def of(cls, covariance: Tensor) -> "Spread":
        """From the covariance (r x r) of what the rows are multiplied with."""
        order = covariance.diagonal().argsort(descending=True)
        spread = covariance[order][:, order]
        damping = ROUNDING_DAMPING * level(spread) * torch.eye(len(order), dtype=spread.dtype)
        # from A = U U^T with U upper triangular: A^-1 = R^T R for R = U^-1
        factor = torch.linalg.cholesky((spread + damping).flip(0, 1)).flip(0, 1)
        return cls(order, torch.linalg.solve_triangular(factor, torch.eye(len(order), dtype=spread.dtype), upper=True))


class Compressed(NamedTuple):
    """What a layer computes by now: its dense weight (m x n) and bias (n,), float64, and the factors that the weight is made of."""

    weight: Tensor
    bias: Tensor
    form: Factors | None = None


class Components(NamedTuple):
    """The product of rank k nearest to a weight in both metrics, its components by falling share of the weighed output."""

    left: Tensor  # (m, k)
    right: Tensor  # (k, n)
    vectors: Tensor  # (n, k), orthonormal: principal directions of the weighed output


@dataclass(frozen=True, eq=False)
class Regression:
    """Find factors F of a layer so that ``x @ F + bias`` is near the original pre-activation z; all float64.

    ``original`` (m x n) is the layer's weight; ``weight`` (m x n) the one to come near to: the original, or where layers
    before are compressed, the least-squares weight from their outputs to z (ridge towards the original). ``bias`` (n,) is the
    original one, ``mean`` (m,) and ``covariance`` (m x m, centred) are of x, ``target_mean`` (n,) of z. ``metric`` (n x n)
    weighs errors of z by what they do to the network's outputs (Gauss-Newton: the mean of ``J H J^T``, J the Jacobian of the
    outputs, H centring over classes), damped; None weighs all alike. ``root`` is its lower Cholesky factor. ``relu``: the layer's activation is ReLU.
    ``samples`` gives up to ``SAMPLE_ROWS`` of (x, z), (p x m) and (p x n).
    """

    name: str
    original: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    covariance: Tensor
    target_mean: Tensor
    metric: Tensor | None
    root: Tensor | None
    relu: bool
    samples: Callable[[], tuple[Tensor, Tensor]]

    def corrected_bias(self, weight: Tensor) -> Tensor:
        """The bias (n,) that makes the mean output right for a dense weight (m x n)."""
        return self.target_mean - self.mean @ weight

    @cached_property
    def spread(self) -> Spread:
        """How rounding errors of one input's row are passed on to the others."""
        return Spread.of(self.covariance)

    @cached_property
    def freedom(self) -> Tensor:
        """Diagonal (m,) of the damped covariance's inverse: what an input varies by beyond all others, inverted."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.damped(SELECTION_DAMPING))).diagonal().clone()

    @cached_property
    def _components(self) -> dict[bool, Components]:
        return {}

    @cached_property
    def _covered(self) -> list[Tensor]:
        return []

    def components(self, rank: int, weighted: bool = True) -> Components:
        """The best product of rank k; parts of a larger one where that is known."""
        root, known = self.root if weighted else None, self._components
        if weighted not in known or known[weighted].left.shape[1] < rank:
            vectors = principal(self.weight, self.covariance, root, rank)
            known[weighted] = Components(*projected(self.weight, root, vectors), vectors)
            if weighted:
                self._covered.clear()
        left, right, vectors = known[weighted]
        return Components(left[:, :rank], right[:rank], vectors[:, :rank])

    def covered(self, rank: int) -> Tensor:
        """The covariance times the left factor (m x k) of the components."""
        left, known = self.components(rank).left, self._covered
        if not known or known[0].shape[1] < rank:
            known[:] = [self.covariance @ left]
        return known[0][:, :rank]

    def low_rank(self, rank: int, weighted: bool = True) -> tuple[Tensor, Tensor]:
        """The rank-k factors (m x k), (k x n) of least error in both metrics, balanced."""
        left, right, _ = self.components(rank, weighted)
        return balanced(left, right)

    def damped(self, share: float) -> Tensor:
        """The covariance plus ``share`` of its mean variance on the diagonal: invertible where inputs are dead or few."""
        covariance = self.covariance.clone()
        covariance.diagonal().add_(share * level(self.covariance))
        return covariance


class Calibration:
    """Regressions of a network's layers on one data set; what was streamed once is kept where it fits.

    Args:
        known: moments of layers of the original network (:func:`slrprop.statistics.moments`), which are not summed again.
    """

    def __init__(self, network: Network, data: Data, known: Mapping[str, Moments] | None = None) -> None:
        self.network, self.data, self._known = network, data, known or {}
        self._inputs: dict[str, list[Tensor] | None] = {}
        self._outputs: dict[str, list[Tensor]] = {}  # original pre-activations
        self._together = False  # whether all batches may go through the network at once
        self._locksteps: dict[bool, Lockstep] = {}  # through the original network, and behind compressed layers
        self._metrics: dict[str, tuple[Tensor, Tensor] | None] = {}
        self._first: dict[tuple[str, bool], Regression] = {}  # of layers whose inputs are the original ones

    def prepare(self, names: tuple[str, ...], weighted: bool = True) -> None:
        """Measure all that the named layers of the original network need at once, where each would take a run of its own."""
        many = tuple(name for name in names if self.network.chain(name) is None and (name, weighted) not in self._first)
        if len(many) < 2:
            return
        if weighted:
            self._measure_metrics(many)
        rows = sum(
            len(z) for flow in self.network.stream(many[:1], self.data, whole=False) for _, z in flow.calls[many[0]]
        )
        shapes = [self.network.shape(name) for name in many]
        once = all(self.network.times_called[name] == 1 for name in self.network.order)
        self._together = once and 4 * rows * max(map(max, shapes)) <= KEPT_BYTES
        size = 4 * rows * sum(n for _, n in shapes)
        outputs: dict[str, list[Tensor]] | None = {} if size <= KEPT_BYTES else None
        for name, summed in moments_of(self.network, many, self.data, False, outputs).items():
            if summed.count:
                self._made(name, {}, weighted, self._known.get(name, summed))
        self._outputs |= outputs or {}

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
            for x, z in self._pairs(name, before):
                summed.add(x, z)
        if not summed.count:
            raise SlrpropError(f"layer '{name}' saw no sample of the calibration data; give data that reaches it")
        return self._made(name, before, weighted, summed)

    def _made(self, name: str, before: dict[str, Compressed], weighted: bool, summed: Moments) -> Regression:
        """The regression out of moments; kept where nothing is compressed before."""
        weight, bias, _ = self._original(name)
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

        def samples() -> tuple[Tensor, Tensor]:
            return self._samples(name, before)

        found = Regression(name, weight, target, bias, mean, covariance, target_mean, metric, root, relu, samples)
        if not before:
            self._first[name, weighted] = found
        return found

    def _original(self, name: str) -> Compressed:
        weight = self.network.weight(name).detach().double().cpu()
        bias = self.network.bias(name)
        return Compressed(weight, weight.new_zeros(weight.shape[1]) if bias is None else bias.detach().double().cpu())

    def _samples(self, name: str, compressed: Mapping[str, Compressed]) -> tuple[Tensor, Tensor]:
        xs, zs, count = [], [], 0
        for x, z in self._pairs(name, compressed):
            xs.append(x[: SAMPLE_ROWS - count].double().cpu())
            zs.append(z[: SAMPLE_ROWS - count].double().cpu())
            count += len(xs[-1])
            if count >= SAMPLE_ROWS:
                break
        return torch.cat(xs), torch.cat(zs)

    def _pairs(self, name: str, compressed: Mapping[str, Compressed]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (input by now, original pre-activation) of a layer."""
        entry = self._entry(name, compressed)
        if entry is not None:
            for x, z in zip(self._inputs[entry] or (), self._outputs_along(entry, name), strict=True):
                yield self._along(entry, x, name, compressed), z
            return
        if not compressed:
            for flow in self.network.stream((name,), self.data, whole=False):
                yield from flow.calls[name]
            return
        yield from zip(self._inputs_now(name, compressed), self._outputs_then(name), strict=True)

    def _outputs_along(self, entry: str, name: str) -> Iterable[Tensor]:
        """The original pre-activations of a layer of a chain; kept where they fit."""
        if name in self._outputs:
            return self._outputs[name]
        inputs = self._inputs[entry] or []
        made = (self._passed(self._along(entry, x, name, {}), name) for x in inputs)
        return self._kept(name, made, sum(map(len, inputs)))

    def _kept(self, name: str, made: Iterable[Tensor], rows: int) -> Iterable[Tensor]:
        """A layer's original pre-activations, from now on kept where they fit."""
        kept = sum(z.nbytes for parts in self._outputs.values() for z in parts)
        if kept + 4 * rows * self.network.shape(name)[1] > KEPT_BYTES:
            return made
        self._outputs[name] = list(made)
        return self._outputs[name]

    def _outputs_then(self, name: str) -> Iterator[Tensor]:
        """The original pre-activations of a layer."""
        if name in self._outputs:
            yield from self._outputs[name]
            return
        found = self._standing(name, {})
        if found is not None:
            weight, bias = self.network.weight(name), self.network.bias(name)
            made = (x.to(weight) @ weight if bias is None else x.to(weight) @ weight + bias for x in found)
            yield from self._kept(name, made, sum(map(len, found)))
            return
        for flow in self.network.stream((name,), self.data, whole=False):
            yield from (z for _, z in flow.calls[name])

    def _inputs_now(self, name: str, compressed: Mapping[str, Compressed]) -> Iterator[Tensor]:
        """A layer's inputs behind the compressed layers."""
        found = self._standing(name, compressed)
        if found is not None:
            yield from found
            return
        weights = {key: value.weight.to(self.network.weight(key)) for key, value in compressed.items()}
        biases = {key: value.bias.to(self.network.weight(key)) for key, value in compressed.items()}
        for flow in self.network.with_weights(weights, None, biases).stream((name,), self.data, whole=False):
            for x, _ in flow.calls[name]:
                yield x

    def _standing(self, name: str, compressed: Mapping[str, Compressed]) -> list[Tensor] | None:
        """A layer's inputs where all batches can be held at once, so that what lies before is not run again."""
        if not self._together:
            return None
        known = self._locksteps.get(bool(compressed))
        if known is None or not known.reaches(name, compressed):
            if known is not None:
                known.close()
            known = self._locksteps[bool(compressed)] = in_lockstep(self.network, self.data)
        found = known.inputs(name, compressed)
        if found is None:
            self.rest()
            self._together = False
        return found

    def rest(self) -> None:
        """Let go of the batches that are on their way through the network."""
        for lockstep in self._locksteps.values():
            lockstep.close()
        self._locksteps.clear()

    def _entry(self, name: str, compressed: Mapping[str, Compressed]) -> str | None:
        """The first layer from which a plain chain leads over all compressed layers to this one, its inputs kept."""
        for first in self.network.order:
            chain = self.network.chain(first)
            steps = [] if chain is None else [step.name for step in chain.steps]
            if name not in (first, *steps):
                continue
            reached = {first, *steps} & set(self.network.order)
            earlier = set(self.network.order[: self.network.order.index(first)])
            if (
                chain is None
                or earlier & set(compressed)
                or not set(compressed) <= reached
                or not chain.is_plain(self.network.weight)
            ):
                continue
            if first not in self._inputs:
                self._inputs[first] = self._keep(first)
            if self._inputs[first] is not None:
                return first
        return None

    def _keep(self, first: str) -> list[Tensor] | None:
        """A layer's inputs, batch by batch; None where they would take too much memory."""
        kept, size = [], 0
        for flow in self.network.stream((first,), self.data, whole=False):
            for x, _ in flow.calls[first]:
                size += x.nbytes
                if size > KEPT_BYTES:
                    return None
                kept.append(x.cpu().clone())
        return kept

    def _along(self, first: str, x: Tensor, name: str, compressed: Mapping[str, Compressed]) -> Tensor:
        """A layer's input, from the inputs of the first layer of its chain."""
        chain = self.network.chain(first)
        assert chain is not None
        layer = first
        for step in chain.steps:
            if layer == name:
                break
            x = ACTIVATIONS[step.activation](self._passed(x, layer, compressed.get(layer)))
            layer = step.name or ""
        return x

    def _passed(self, x: Tensor, name: str, compressed: Compressed | None = None) -> Tensor:
        """A layer's pre-activation."""
        weight, bias, form = compressed or self._original(name)
        if form is None or form.multiplications >= weight.numel():
            return torch.addmm(bias.to(x), x, weight.to(x))
        made_of = next(iter(form.matrices().values()))  # factors have a dtype of their own
        return form.product(x.to(made_of)).to(x) + bias.to(x)

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
