"""Exact changes of the loss when one neuron of a low-rank layer is shortened, for chains of dense layers.

Shortening input i moves the pre-activation by ``-x_i d_i`` with ``d_i = left[i, rk:] @ right[rk:]``; shortening
output j moves only pre-activation j, and through its activation the next layer by one row of its weight. Each
candidate is so an *injection* ``s[p, i] * D[i]`` into one layer, and only this change travels on to the loss.
Five kernels share the work: single (the changed output is the network's own), outputs (all of the network's outputs move along
given directions: products of matrices), pairs (each sample and candidate
pushed through the rest), wide (ReLU layers: away from sign flips the map is linear, so all candidates pass
as a product of small matrices, and the few units that could flip are corrected one by one; still exact), and alike
(the same idea in compiled loops, for samples that are active alike: :mod:`slrprop.relevance.alike`, extra ``numba``).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from slrprop.linalg import SVD
from slrprop.losses import LARGE, Point, at
from slrprop.network.chain import ACTIVATIONS, Chain
from slrprop.relevance import alike

WIDE = 256  # from this width on a ReLU layer is worth the wide kernel
FEW_OUTPUTS = 256  # the wide kernels for full-rank injections need a narrow next layer
IN_FLIGHT = 1 << 19  # numbers that a kernel takes at once on a CPU: about the cache
ON_CUDA = 64  # times as many there: one launch has to keep the whole device busy
OUTER_SAMPLES = 128  # samples whose linear maps are computed by one large product


def activation_change(d: Tensor, z: Tensor, activation: str) -> Tensor:
    """``act(z + d) - act(z)`` without cancellation for ReLU."""
    if activation == "identity":
        return d
    if activation == "relu":
        below = z.neg()
        return torch.maximum(d, below) - below.clamp_(min=0)
    act = ACTIVATIONS[activation]
    return act(z + d) - act(z)


def _groups(sizes: Tensor) -> list[Tensor]:
    """The largest hundredth of the candidates, and the rest: a few large ones would make many units look risky for all."""
    order = sizes.argsort(descending=True)
    return [group for group in order.tensor_split([len(order) // 100]) if len(group)]


def _in_flight(x: Tensor) -> int:
    """How many numbers a kernel takes at once where ``x`` is."""
    return IN_FLIGHT * (ON_CUDA if x.is_cuda else 1)


def _tiles(start: int, stop: int, s: Tensor) -> Iterator[slice]:
    """Samples in tiles with as many numbers in flight, for candidates that are the columns of ``s``."""
    tile = max(1, _in_flight(s) // (s.shape[1] * 32))
    return (slice(first, min(first + tile, stop)) for first in range(start, stop, tile))


def _norm(x: Tensor, dim: int) -> Tensor:
    return x.square().sum(dim).sqrt()


@dataclass(frozen=True, eq=False)
class Walk:
    """One batch at the base network: pre-activations z[t] (p x n_t) of the chain's layers and the loss there."""

    chain: Chain
    z: list[Tensor]
    point: Point

    def push(self, d: Tensor, level: int, sample: object) -> Tensor:
        """Change of the loss when pre-activation ``level`` of the indexed samples moves by ``d`` (..., n_level)."""
        for t, step in enumerate(self.chain.steps[level:], level):
            d = activation_change(d, at(self.z[t], sample), step.activation) @ step.weight
        return self.point.change(d, sample)

    def pairs(self, s: Tensor, direction: Tensor, level: int) -> Tensor:
        """Sum over samples of the loss changes for injections ``s[p, i] * direction[i]`` at ``level``: (candidates,)."""
        total = s.new_zeros(s.shape[1], dtype=torch.float64)
        width = max([direction.shape[1], *(step.weight.shape[1] for step in self.chain.steps[level:])])
        scales = s.flatten()
        pairs = scales.nonzero()[:, 0]
        scales = scales.index_select(0, pairs)
        samples = pairs // s.shape[1]
        candidates = pairs - samples * s.shape[1]
        count = max(1, _in_flight(s) // width)
        for sample, candidate, scale in zip(
            samples.split(count), candidates.split(count), scales.split(count), strict=True
        ):
            d = direction.index_select(0, candidate).mul_(scale[:, None])
            total.index_add_(0, candidate, self.push(d, level, sample).double())
        return total

    def outputs(self, s: Tensor, direction: Tensor) -> Tensor:
        """Like :meth:`pairs` for injections into the network's outputs."""
        far = s.abs() * direction.abs().amax(1) > LARGE
        total = self.pairs(s * far, direction, len(self.chain.steps))
        tile = max(1, _in_flight(s) // s.shape[1])
        for part in (slice(start, start + tile) for start in range(0, len(s), tile)):
            near = s[part].masked_fill(far[part], 0)
            total += self.point.change_along(near, direction, part).double().sum(0)
        return total

    def _wide_steps(self, level: int) -> int:
        """How many steps from ``level`` on are ReLU."""
        steps = self.chain.steps[level:]
        return next((i for i, step in enumerate(steps) if step.activation != "relu"), len(steps))

    def wide_low_rank(self, s: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Like :meth:`pairs` at level 0 with ``direction = left @ right``, for wide ReLU layers.

        Per sample, every candidate's change at layer t is coefficients (candidates x r) times a basis (r x n_t).
        A ReLU masks the basis; each unit that may flip adds one coefficient column (its exact correction) and one
        basis row (its outgoing weights).
        """
        total = s.new_zeros(s.shape[1], dtype=torch.float64)
        linear_steps = self._wide_steps(0)
        norms = left.norm(dim=1)
        for start in range(0, len(s), OUTER_SAMPLES):
            stop = min(start + OUTER_SAMPLES, len(s))
            bases = [right.expand(stop - start, *right.shape)]
            for t, step in enumerate(self.chain.steps[:linear_steps]):
                mask = (self.z[t][start:stop, None] > 0).to(s)
                bases.append(((bases[-1] * mask).flatten(0, 1) @ step.weight).unflatten(0, (stop - start, -1)))
            lengths = [_norm(basis, 1) for basis in bases[:-1]]
            for group in _groups(s[start:stop].abs().amax(0) * norms):
                chosen, factor, norm = s[:, group], left[group], norms[group]
                for part in _tiles(start, stop, chosen):
                    local = slice(part.start - start, part.stop - start)
                    near = ([basis[local] for basis in bases], [length[local] for length in lengths])
                    change = self._low_rank_tile(chosen[part], factor, norm, *near, part)
                    total[group] += change.double().sum(0)
        return total

    def _low_rank_tile(
        self, s: Tensor, left: Tensor, norms: Tensor, bases: list[Tensor], lengths: list[Tensor], part: slice
    ) -> Tensor:
        """Loss changes (samples x candidates) of one tile; ``lengths`` are the norms of the bases' columns."""
        coefficients = s[:, :, None] * left
        reach = (s.abs() * norms).amax(1)[:, None]  # longest coefficient vector of each sample
        corrections = s.new_zeros(*s.shape, 0)
        outgoing = s.new_zeros(len(s), 0, bases[0].shape[2])
        for t, basis in enumerate(bases):
            z, bound, risky = self.z[t][part], None, 0
            if t < len(lengths):
                bound = reach * lengths[t]
                if outgoing.shape[1]:
                    bound = bound + _norm(corrections, 2).amax(1)[:, None] * _norm(outgoing, 1)
                bound = bound * alike.SLACK
                risky = int((z.abs() <= bound).sum(1).max())
            if bound is None or 2 * risky > basis.shape[2]:
                d = coefficients @ basis
                d = d + corrections @ outgoing if outgoing.shape[1] else d
                return self.push(d, t, (part, None))
            weight = self.chain.steps[t].weight
            carried = (outgoing * (z > 0).to(s)[:, None]) @ weight
            unit = (z.abs() - bound).topk(risky, largest=False).indices
            at = unit[:, None].expand(-1, basis.shape[1], -1)
            d = coefficients @ basis.gather(2, at)
            if outgoing.shape[1]:
                d = d + corrections @ outgoing.gather(2, unit[:, None].expand(-1, outgoing.shape[1], -1))
            flip = self._flips(d, z.gather(1, unit)[:, None])
            corrections, outgoing = torch.cat([corrections, flip], 2), torch.cat([carried, weight[unit]], 1)
        raise AssertionError("the last basis always returns")

    @staticmethod
    def _flips(d: Tensor, z: Tensor) -> Tensor:
        """What a ReLU adds to its linear part at z: zero where the sign does not flip."""
        return activation_change(d, z, "relu") - d * (z > 0)

    def wide_full_rank(self, s: Tensor, direction: Tensor, level: int) -> Tensor:
        """Like :meth:`pairs` for a wide ReLU layer with few outputs after it."""
        total = s.new_zeros(s.shape[1], dtype=torch.float64)
        weight = self.chain.steps[level].weight
        sizes = direction.abs().amax(1)
        outer = max(1, min(OUTER_SAMPLES, 1024 // weight.shape[1]))
        for start in range(0, len(s), outer):
            stop = min(start + outer, len(s))
            mask = (self.z[level][start:stop] > 0).to(s)
            through = (mask.T[:, :, None] * weight[:, None]).flatten(1)  # n x (samples * outputs)
            linear = (direction @ through).unflatten(1, (stop - start, -1)).movedim(1, 0)
            for group in _groups(s[start:stop].abs().amax(0) * sizes):
                chosen, by_unit, through_group = s[:, group], direction[group].T.contiguous(), linear[:, group]
                peaks = by_unit.abs().amax(1)
                for part in _tiles(start, stop, chosen):
                    z, share = self.z[level][part], chosen[part]
                    bound = share.abs().amax(1)[:, None] * peaks * alike.SLACK
                    risky = int((z.abs() <= bound).sum(1).max())
                    d = share[:, :, None] * through_group[part.start - start : part.stop - start]
                    if risky:
                        unit = (z.abs() - bound).topk(risky, largest=False).indices
                        moved = share[:, None] * by_unit[unit]
                        d = d + self._flips(moved, z.gather(1, unit)[:, :, None]).mT @ weight[unit]
                    total[group] += self.push(d, level + 1, (part, None)).double().sum(0)
        return total

    def alike(self, parts: Iterable[alike.Part], count: int, level: int) -> Tensor:
        """Sum over samples of the loss changes, from those of pre-activation ``level``: (candidates,)."""
        total = torch.zeros(count, dtype=torch.float64)
        for samples, candidates, d in parts:
            tiles = max(1, IN_FLIGHT // d[0].numel())
            for some, which, moved in zip(*(x.split(tiles) for x in (samples, candidates, d)), strict=True):
                change = self.push(moved, level, (some, None))
                total.index_add_(0, which.flatten(), change.double().flatten())
        return total

    def wide(self, level: int) -> bool:
        """Whether behind ``level`` there is a wide ReLU layer, and few outputs behind that."""
        steps = self.chain.steps[level:]
        return (
            bool(steps)
            and steps[0].activation == "relu"
            and steps[0].weight.shape[1] <= FEW_OUTPUTS
            and self.z[level].shape[1] >= WIDE
        )

    def low_rank(self, s: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Sum over samples of the loss changes for injections ``s[p, i] * left[i] @ right`` at level 0, by the fastest kernel."""
        steps = self.chain.steps
        if not steps:
            return self.outputs(s, left @ right)
        if self.wide(0) and alike.usable(s):
            return self.alike(alike.behind_one_low_rank(self.z[0], s, left, right, steps[0].weight), len(left), 1)
        if self._wide_steps(0) > 1 and self.wide(1) and alike.usable(s):
            weights = steps[0].weight, steps[1].weight
            return self.alike(alike.behind_two(self.z[0], self.z[1], s, left, right, *weights), len(left), 2)
        if self._wide_steps(0) and right.shape[1] >= WIDE:
            return self.wide_low_rank(s, left, right)
        return self.pairs(s, left @ right, 0)

    def full_rank(self, s: Tensor, direction: Tensor, level: int) -> Tensor:
        """The same for injections ``s[p, i] * direction[i]`` at a level."""
        if level == len(self.chain.steps):
            return self.outputs(s, direction)
        if not self.wide(level):
            return self.pairs(s, direction, level)
        if alike.usable(s):
            parts = alike.behind_one(self.z[level], s, direction, self.chain.steps[level].weight)
            return self.alike(parts, len(direction), level + 1)
        return self.wide_full_rank(s, direction, level)


def chain_changes(x: Tensor, svd: SVD, reduced_rank: int, walk: Walk, inputs: bool = True) -> tuple[Tensor, Tensor]:
    """Summed loss changes over the batch for shortening each input (m,) and each output (n,), in float64.

    Args:
        x: the layer's inputs (p x m).
        walk: the batch at the truncated layer; ``walk.z[0]`` is the layer's output after its own batch norm.
        inputs: False leaves those of the inputs out (0,).
    """
    chain = walk.chain
    left, right = svd.left[:, reduced_rank:].contiguous(), svd.vt[reduced_rank:] * chain.scale
    rows = walk.low_rank(-x, left, right) if inputs else x.new_zeros(0, dtype=torch.float64)
    tail = (x @ left) @ right
    if not chain.steps:
        return rows, walk.point.single_change(-tail).double().sum(0)
    moved = activation_change(-tail, walk.z[0], chain.steps[0].activation)
    return rows, walk.full_rank(moved, chain.steps[0].weight, 1)
