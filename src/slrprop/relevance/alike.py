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


def _behind(weight: Tensor, references: list[Tensor], after: Tensor) -> Iterator[Tensor]:
    """``weight @ (r * after)`` (m x c) for each reference r, of many at once: a product with few columns is slow."""
    at_once = max(1, 2048 // after.shape[1])
    for start in range(0, len(references), at_once):
        masked = [after * r[:, None] for r in references[start : start + at_once]]
        yield from (weight @ torch.cat(masked, 1)).split(after.shape[1], 1)


def _even(weight: Tensor) -> Tensor:
    """An even number of columns (one of zeros more if need be)."""
    return torch.nn.functional.pad(weight, (0, weight.shape[1] % 2))


def _ended(x: Tensor, dim: int) -> Tensor:
    """One zero more along an axis."""
    return torch.cat([x, x.new_zeros([1 if i == dim % x.ndim else n for i, n in enumerate(x.shape)])], dim)


def _largest(x: Tensor) -> Tensor:
    """Norms of the 1, 2, 4, ... LARGEST numbers in each column (n x m), and of all: levels x m."""
    count = min(LARGEST, len(x))
    norms = x.T.contiguous().abs_().topk(count, dim=1).values.square_().cumsum(1).sqrt_()
    levels = [min(1 << level, count) - 1 for level in range(count.bit_length())]
    return torch.cat([norms[:, levels].T, x.norm(dim=0, keepdim=True)])


def _tiled(sizes: Tensor) -> tuple[int, Tensor]:
    """How many candidates move, and these by size, the last tile filled up with the first one."""
    order = sizes.argsort(descending=True)
    count = int((sizes > 0).sum())
    return count, torch.cat([order[:count], order[:1].expand(-count % TILE)])


def _scaled(s: Tensor, order: Tensor, count: int) -> Tensor:
    chosen = s[:, order]
    chosen[:, count:] = 0
    return chosen


def _run(name: str, *tensors: Tensor) -> None:
    """One of the compiled loops, in as many threads as torch has."""
    import numba

    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    threads = min(torch.get_num_threads(), most)
    with RUNNING:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            getattr(loops(), name)(*(tensor.contiguous().numpy() for tensor in tensors), threads)
        finally:
            numba.set_num_threads(before)


def behind_one(z: Tensor, s: Tensor, direction: Tensor, weight: Tensor) -> Iterator[Part]:
    """What follows a ReLU layer changes by, for injections ``s[p, i] * direction[i]`` into it.

    Args:
        z: pre-activations (p x n); ``s``: p x m; ``direction``: m x n; ``weight``: n x c.

    Yields:
        samples (b,), candidates (tiles * TILE,) and their changes (b x tiles x TILE x c). Candidates that don't move are left out; the last
        tile is filled with the first candidate, its changes there being zero.
    """
    c, after, groups = weight.shape[1], _even(weight), alike(z > 0)
    turned = direction.T.contiguous()
    peaks = turned.abs().amax(1) * SLACK
    linears = _behind(direction, [reference for _, reference in groups], after)
    for (group, reference), linear in zip(groups, linears, strict=True):
        for samples in group.split(max(1, NUMBERS // (s.shape[1] * c))):
            moves, at = s[samples], z[samples]
            sizes = moves.abs()
            count, order = _tiled(sizes.amax(0))
            if not count:
                continue
            outside = torch.where(reference, -at, at) + sizes.amax(1)[:, None] * peaks
            units = (outside >= 0).any(0).nonzero()[:, 0]
            likely = outside[:, units] >= 0
            out = z.new_zeros(len(samples), len(order) // TILE, after.shape[1], TILE)
            tiles = linear[order].unflatten(0, (-1, TILE)).mT
            _run(
                "one_layer", _ended(at[:, units], 1), _ended(reference[units], 0),
                likely.sum(1).cumsum(0), likely.nonzero()[:, 1], units,
                _scaled(moves, order, count), turned, order, _ended(after[units], 0), tiles, out,
            )  # fmt: skip
            yield samples, order, out[:, :, :c].mT


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
    c, n, after = weight.shape[1], z.shape[1], _even(weight)
    groups = alike(torch.cat([z, z_next], 1) > 0)
    first, second = ([reference[part] for _, reference in groups] for part in (slice(n), slice(n, None)))
    norms, linears = left.norm(dim=1), _behind(between, second, after)
    basis = [(right * reference) @ between for reference in first]
    lengths, turned, spans = right.norm(dim=0), _ended(right.T, 0), _largest(between)
    for index, ((group, _), behind) in enumerate(zip(groups, linears, strict=True)):
        for samples in group.split(max(1, NUMBERS // (s.shape[1] * c))):
            moves, at, at_next = s[samples], z[samples], z_next[samples]
            count, order = _tiled(moves.abs().amax(0) * norms)
            if not count:
                continue
            apart = (at > 0).to(z) - first[index].to(z)
            units = apart.any(0).nonzero()[:, 0]
            own = (right[:, units] * apart[:, None, units]).flatten(0, 1) @ between[units]
            own = own.unflatten(0, (len(samples), -1)) + basis[index]  # b x r x l
            reference = second[index]
            linear = (own * reference) @ after
            out = z.new_empty(len(samples), len(order) // TILE, after.shape[1], TILE)
            _run(
                "two_layers", at, turned, lengths, _ended(behind, 0), between, at_next, reference, own,
                own.square().sum(1).sqrt_(), spans, after.T, _scaled(moves, order, count), left[order].T, linear.mT, out,
            )  # fmt: skip
            yield samples, order, out[:, :, :c].mT
