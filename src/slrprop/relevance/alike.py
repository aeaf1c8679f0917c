"""Exact changes behind one or two ReLU layers, by the compiled loops, samples that are active alike together."""

import functools
import importlib
import threading
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

PER_REFERENCE = 64  # samples, in the mean
ROUNDS = 4  # of k-means
LARGEST = 256  # numbers of a column by which a sparse product with it is bounded
SLACK = 1 + 1e-4  # bounds are rounded up by this much
NUMBERS = 1 << 24  # that the changes of some samples may be
ROWS = 1024  # of a product with a layer's whole weight: fewer wait for the memory
TILE = 64  # candidates that the loops take side by side
RUNNING = threading.Lock()  # some of numba's thread pools take one call at a time
Part = tuple[Tensor, Tensor, Tensor]


@functools.cache
def loops() -> ModuleType | None:
    """The compiled loops; None without numba, or where it can't keep what it compiles."""
    try:
        return importlib.import_module("slrprop.relevance.compiled")
    except (ImportError, RuntimeError):
        return None


def usable(x: Tensor) -> bool:
    """Whether the compiled loops can run on such a tensor."""
    return x.device.type == "cpu" and loops() is not None


def alike(masks: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Samples (indices) with alike masks (p x n), and which units are active in most of them (n,): k-means by counts of units."""
    values = masks.to(torch.float32)
    count = max(1, len(values) // PER_REFERENCE)
    centers = values[torch.linspace(0, len(values) - 1, count).long()]
    for _ in range(ROUNDS):
        nearest = torch.addmm(centers.sum(1), values, centers.T, alpha=-2).argmin(1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, values)
        centers = (2 * sums > nearest.bincount(minlength=count)[:, None]).to(values)
    parts = ((nearest == index).nonzero()[:, 0] for index in range(count))
    return [(samples, center > 0) for samples, center in zip(parts, centers, strict=True) if len(samples)]


def _largest(x: Tensor) -> Tensor:
    """Norms of the 1, 2, 4, ... LARGEST numbers in each column (n x m), and of all: levels x m."""
    count = min(LARGEST, len(x))
    norms = x.T.contiguous().abs_().topk(count, dim=1).values.square_().cumsum(1).sqrt_()
    levels = [min(1 << level, count) - 1 for level in range(count.bit_length())]
    return torch.cat([norms[:, levels].T, x.norm(dim=0, keepdim=True)])


def _split(moving: Tensor, samples: Tensor, each: int) -> Iterator[Tensor]:
    """Samples in parts, whose moving candidates (p x m) have no more than ``NUMBERS`` numbers at ``each``."""
    filled = -(-moving[samples].sum(1) // TILE) * TILE * each
    part = filled.cumsum(0) // NUMBERS
    return (samples[part == index] for index in part.unique().tolist())


def _tiles(moves: Tensor, taken: Tensor) -> Part:
    """The candidates taken of each sample (p x m): samples (t,), candidates (t x TILE), their moves.

    Zeros of the first candidate fill a sample's last tile.
    """
    sample, candidate = taken.nonzero(as_tuple=True)
    counts = sample.bincount(minlength=len(moves))
    tiles = -(-counts // TILE)
    slot = torch.arange(len(sample)) + ((tiles.cumsum(0) - tiles) * TILE - (counts.cumsum(0) - counts))[sample]
    samples = torch.arange(len(moves)).repeat_interleave(tiles)
    candidates = candidate.new_zeros(len(samples) * TILE).index_copy_(0, slot, candidate)
    filled = moves.new_zeros(len(samples) * TILE).index_copy_(0, slot, moves[sample, candidate])
    return samples, candidates.unflatten(0, (-1, TILE)), filled.unflatten(0, (-1, TILE))


def _low_rank_tiles(s: Tensor, left: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The moving candidates of each sample (p x m), the largest first: samples (t,), candidates (t x TILE), how far along each component (t x r x TILE)."""
    order = (s.abs().amax(0) * norms).argsort(descending=True)
    ranked = s[:, order]
    samples, places, moves = _tiles(ranked, ranked != 0)
    candidates = order[places]
    return samples, candidates, (left[candidates] * moves[:, :, None]).mT


def _run(name: str, *tensors: Tensor) -> None:
    """One of the compiled loops, in as many threads as torch has."""
    import numba

    most, asked = numba.config.NUMBA_NUM_THREADS, torch.get_num_threads()  # type: ignore[attr-defined]
    with RUNNING:
        before = numba.get_num_threads()
        numba.set_num_threads(min(asked, most))
        try:
            getattr(loops(), name)(*(tensor.contiguous().numpy() for tensor in tensors))
        finally:
            numba.set_num_threads(before)
            torch.set_num_threads(asked)  # numba's pool of OpenMP threads may have changed them


def _gathered(source: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``source[rows][:, columns]`` in contiguous blocks of TILE columns (k x u x TILE), zeros at the end."""
    out = source.new_empty(-(-len(columns) // TILE), len(rows), TILE)
    _run("gathered", source, rows, columns, out)
    return out


def _through(groups: list[tuple[Tensor, Tensor]], turned: Tensor, weight: Tensor) -> Iterator[Part]:
    """Groups and references of :func:`alike`, with what the outputs move by for ``turned`` (n x m) by that reference (c x m); several by one product."""
    count = max(1, ROWS // weight.shape[1])
    for first in range(0, len(groups), count):
        some = groups[first : first + count]
        masks = torch.stack([reference for _, reference in some])
        found = ((masks[:, None] * weight.T).flatten(0, 1) @ turned).unflatten(0, (len(some), -1))
        yield from ((samples, reference, out) for (samples, reference), out in zip(some, found, strict=True))


def behind_one(z: Tensor, s: Tensor, direction: Tensor, weight: Tensor) -> Iterator[Part]:
    """What follows a ReLU layer changes by, for injections ``s[p, i] * direction[i]`` into it.

    Args:
        z: pre-activations (p x n); ``s``: p x m; ``direction``: m x n; ``weight``: n x c.

    Yields:
        samples (t,), candidates (t x TILE) and their changes (t x TILE x c). Candidates that don't move are left out; what fills
        a sample's last tile changes nothing.
    """
    c, moving = weight.shape[1], s != 0
    turned, highest = direction.T.contiguous(), direction.abs().amax(0) * SLACK
    for group, reference, through in _through(alike(z > 0), turned, weight):
        for samples in _split(moving, group, c):
            often = moving[samples].sum(0)
            some = often.argsort(descending=True)[: int((often > 0).sum())]  # those of many samples side by side
            moves, at = s[samples][:, some], z[samples]
            # what most samples take all of them take, so that their tiles are the same and one after the other
            tiles = _tiles(moves, (moves != 0) | (2 * often[some] >= len(samples)))
            if not len(tiles[0]):
                continue
            turn = tiles[1][:, 0].argsort()
            tiles = tiles[0][turn], tiles[1][turn], tiles[2][turn]
            reach = moves.abs().amax(1)[:, None]
            likely = torch.where(reference, -at, at) + reach * highest >= 0
            units = likely.any(0).nonzero()[:, 0]
            likely, near = likely[:, units], _gathered(turned, units, some)
            linear = _gathered(through, torch.arange(c), some)
            out = z.new_empty(len(tiles[0]), c, TILE)
            _run(
                "one_layer", at[:, units], reference[units], likely.sum(1).cumsum(0), likely.nonzero()[:, 1], near, highest[units],
                weight[units], linear, *tiles, out,
            )  # fmt: skip
            yield samples[tiles[0]], some[tiles[1]], out.mT


def behind_one_low_rank(z: Tensor, s: Tensor, left: Tensor, right: Tensor, weight: Tensor) -> Iterator[Part]:
    """Like :func:`behind_one` for injections ``s[p, i] * left[i] @ right``, of few components: every sample is its own reference.

    Args:
        z: pre-activations (p x n); ``s``: p x m; ``left``: m x r; ``right``: r x n; ``weight``: n x c.

    Yields:
        see :func:`behind_one`.
    """
    c, moving, norms, lengths = weight.shape[1], s != 0, left.norm(dim=1), right.norm(dim=0)
    for rows in torch.arange(len(s)).split(PER_REFERENCE):
        for samples in _split(moving, rows, max(c, len(right))):
            at = z[samples]
            sample, candidates, shares = _low_rank_tiles(s[samples], left, norms)
            if not len(sample):
                continue
            linear = ((right * (at > 0).to(z)[:, None]).flatten(0, 1) @ weight).unflatten(0, (len(samples), -1))
            out, none = z.new_empty(len(sample), c, TILE), z.new_empty(len(samples), len(right), 0)
            _run(
                "low_rank", at, right.T, lengths, weight, z.new_empty(z.shape[1], 0), none[:, 0], torch.empty(0, dtype=torch.bool), none,
                none[:, 0], none[:1, 0], z.new_empty(0, c), linear, sample, shares, out,
            )  # fmt: skip
            yield samples[sample], candidates, out.mT


def behind_two(
    z: Tensor, z_next: Tensor, s: Tensor, left: Tensor, right: Tensor, between: Tensor, weight: Tensor
) -> Iterator[Part]:
    """What follows two ReLU layers changes by, for injections ``s[p, i] * left[i] @ right`` into the first.

    Args:
        z, z_next: pre-activations of the first and the second layer (p x n, p x l).
        s: p x m; ``left``: m x r; ``right``: r x n; ``between``: n x l; ``weight``: l x c.

    Yields:
        see :func:`behind_one`.
    """
    c, n, moving, norms = weight.shape[1], z.shape[1], s != 0, left.norm(dim=1)
    lengths, spans = right.norm(dim=0), _largest(between)
    for group, reference in alike(torch.cat([z, z_next], 1) > 0):
        first, second = reference[:n].to(z), reference[n:]
        basis, behind = (right * first) @ between, between @ (weight * second[:, None])
        for samples in _split(moving, group, max(c, len(right))):
            at, at_next = z[samples], z_next[samples]
            sample, candidates, shares = _low_rank_tiles(s[samples], left, norms)
            if not len(sample):
                continue
            apart = (at > 0).to(z) - first
            units = apart.any(0).nonzero()[:, 0]
            own = (right[:, units] * apart[:, None, units]).flatten(0, 1) @ between[units]
            own = own.unflatten(0, (len(samples), -1)) + basis  # b x r x l
            linear = (own * second) @ weight
            out = z.new_empty(len(sample), c, TILE)
            _run(
                "low_rank", at, right.T, lengths, behind, between, at_next, second, own,
                own.square().sum(1).sqrt_(), spans, weight, linear, sample, shares, out,
            )  # fmt: skip
            yield samples[sample], candidates, out.mT
