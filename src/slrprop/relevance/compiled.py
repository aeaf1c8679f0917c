"""Compiled loops for exact changes behind ReLU layers (extra ``numba``); :mod:`slrprop.relevance.alike` calls them.

A *reference* is a mask r of active units. With it, the layers behind an injection are one matrix; a unit at z that moves by d
adds ``relu(z + d) - relu(z) - r d`` to that, which is zero unless its sign is not the reference's, or flips. Which units these
are is found by bounds and then by looking, for every tile of a sample's candidates; what they add is a product of small matrices.
"""

import numpy as np
from numba import njit, prange

from slrprop.relevance.alike import SLACK, TILE

BLOCK = 128  # units whose weights are gathered for one product
FAST = {"contract", "nsz", "reassoc"}


@njit(fastmath=FAST, cache=True)
def _add(total, weight, rows, columns, moved, space):  # type: ignore[no-untyped-def]
    """``total[k] += sum_i weight[rows[i], columns[k]] * moved[i]``, with ``space`` for (BLOCK + TILE) times the columns."""
    wide = len(columns)
    part, rest = space[: wide * TILE].reshape(wide, TILE), space[wide * TILE :]
    for first in range(0, len(rows), BLOCK):
        some = min(BLOCK, len(rows) - first)
        chosen = rest[: some * wide].reshape(some, wide)
        for i in range(some):
            source = weight[rows[first + i]]
            for k in range(wide):
                chosen[i, k] = source[columns[k]]
        np.dot(chosen.T, moved[first : first + some], part)
        total += part


@njit(parallel=True, cache=True)
def gathered(source, rows, columns, out, threads):  # type: ignore[no-untyped-def]
    """Sets ``out`` (k x u x TILE) to ``source[rows[u], columns[:]]`` in blocks of TILE columns; zeros fill the last one."""
    for thread in prange(threads):
        for u in range(thread, len(rows), threads):
            row = source[rows[u]]
            for block in range(len(out)):
                one, first = out[block, u], block * TILE
                some = min(TILE, len(columns) - first)
                for j in range(some):
                    one[j] = row[columns[first + j]]
                one[some:] = 0


@njit(fastmath=FAST, cache=True)
def _places(here, rows, places):  # type: ignore[no-untyped-def]
    """Where candidates ``here``, which ascend, are in blocks (k x rows x TILE), row 0; whether side by side."""
    for j in range(TILE):
        places[j] = here[j] // TILE * rows * TILE + here[j] % TILE
    return here[0] % TILE == 0 and here[TILE - 1] - here[0] == TILE - 1


@njit(fastmath=FAST, cache=True)
def _picked(row, blocks, u, places, together):  # type: ignore[no-untyped-def]
    """Sets ``row`` to a row's numbers at these places."""
    first = u * TILE
    if together:
        row[:] = blocks[first + places[0] : first + places[0] + TILE]
    else:
        for j in range(TILE):
            row[j] = blocks[first + places[j]]


@njit(parallel=True, fastmath=FAST, cache=True)
def one_layer(z, reference, ends, likely, near, peaks, weight, linear, samples, candidates, moves, out, threads):  # type: ignore[no-untyped-def]
    """What follows one ReLU layer changes by, for injections of ``moves[t, j]`` times what is ``near`` for candidate ``candidates[t, j]`` into it.

    Args:
        z: pre-activations of the u units that may be needed (b x u).
        reference: whether each is active there (u,).
        likely: the units that any candidate may need, sample by sample; ``ends``: how many up to each sample's last (b,).
        near: what a candidate moves them by, in blocks (k x u x TILE); ``peaks``: the most of it (u,).
        weight: outgoing (u x c).
        linear: the change by the reference for a move of 1, in blocks (k x c x TILE).
        samples: of each tile (t,); ``candidates``, ``moves``: t x TILE.
        out: the changes (t x c x TILE).
        threads: each takes every so many tiles.
    """
    every, c, zero = len(peaks), weight.shape[1], z.dtype.type(0)
    columns, near_blocks, linear_blocks = np.arange(c), near.reshape(-1), linear.reshape(-1)
    for thread in prange(threads):
        places, space = np.empty(TILE, np.int64), np.empty((BLOCK + TILE) * c, z.dtype)
        moved, chosen, row = np.empty((every, TILE), z.dtype), np.empty(every, np.int64), np.empty(TILE, z.dtype)
        for tile in range(thread, len(samples), threads):
            p, here, scale, total = samples[tile], candidates[tile], moves[tile], out[tile]
            together = _places(here, c, places)
            for k in range(c):
                _picked(row, linear_blocks, k, places, together)
                total[k] = scale * row
            _places(here, every, places)
            reach, count = np.abs(scale).max(), 0
            for place in range(ends[p - 1] if p else 0, ends[p]):
                u = likely[place]
                at, one = z[p, u], moved[count]
                if (-at if reference[u] else at) + reach * peaks[u] < 0:
                    continue
                base, kept, most = max(at, zero), z.dtype.type(reference[u]), zero
                _picked(row, near_blocks, u, places, together)
                for j in range(TILE):
                    d = scale[j] * row[j]
                    one[j] = max(at + d, zero) - base - kept * d
                    most += abs(one[j])
                chosen[count] = u
                count += most > 0
            _add(total, weight, chosen[:count], columns, moved, space)


@njit(fastmath=FAST, cache=True)
def _flips(share, z, right, lengths, listed, flip):  # type: ignore[no-untyped-def]
    """Units of a ReLU layer that flip when its pre-activations z move by ``right @ share``, for some candidate.

    Returns how many, and the longest of the candidates' shares. ``listed``: these units; ``flip``: by what each candidate goes beyond
    zero there (units x TILE).
    """
    zero, size = z.dtype.type(0), np.zeros(TILE, z.dtype)
    for q in range(len(share)):
        for j in range(TILE):
            size[j] += share[q, j] * share[q, j]
    reach, count = np.sqrt(size.max()) * z.dtype.type(SLACK), 0
    for u in range(len(z)):
        at = z[u]
        if reach * lengths[u] < abs(at):
            continue
        one, most, away = flip[count], zero, z.dtype.type(-1 if at > 0 else 1)
        one[:] = at
        for q in range(len(share)):
            for j in range(TILE):
                one[j] += right[u, q] * share[q, j]
        for j in range(TILE):
            one[j] = max(away * one[j], zero)
            most += one[j]
        listed[count] = u
        count += most > 0
    return count, reach


@njit(parallel=True, fastmath=FAST, cache=True)
def one_layer_low_rank(z, right, lengths, weight, linear, samples, shares, out, threads):  # type: ignore[no-untyped-def]
    """What follows one ReLU layer changes by, for injections ``right @ shares[t, :, j]`` into it.

    Args:
        z: pre-activations (b x n).
        right: n x r; ``lengths``: their norms (n,).
        weight: outgoing (n x c).
        linear: the change for each component while no unit flips (b x c x r).
        samples: of each tile (t,); ``shares``: t x r x TILE.
        out: the changes (t x c x TILE).
        threads: each takes every so many tiles.
    """
    n, c = z.shape[1], weight.shape[1]
    columns = np.arange(c)
    for thread in prange(threads):
        flip, chosen = np.empty((n, TILE), z.dtype), np.empty(n, np.int64)
        space = np.empty((BLOCK + TILE) * c, z.dtype)
        for tile in range(thread, len(samples), threads):
            p = samples[tile]
            count, _ = _flips(shares[tile], z[p], right, lengths, chosen, flip)
            np.dot(linear[p], shares[tile], out[tile])
            _add(out[tile], weight, chosen[:count], columns, flip, space)


@njit(parallel=True, fastmath=FAST, cache=True)
def two_layers(  # type: ignore[no-untyped-def]
    z,
    right,
    lengths,
    behind,
    between,
    z_next,
    reference,
    basis,
    reaches,
    spans,
    weight,
    linear,
    samples,
    shares,
    out,
    threads,
):
    """What follows two ReLU layers changes by, for injections ``right @ shares[t, :, j]`` into the first.

    Args:
        z: pre-activations of the first layer (b x n).
        right: n x r; ``lengths``: their norms (n,).
        behind: what an output of the first layer adds by the reference of the second (n x c).
        between: weights from the first to the second layer (n x m).
        z_next: pre-activations of the second layer (b x m).
        reference: whether its units are active there (m,).
        basis: what the second layer moves by for each component while no unit of the first flips (b x r x m).
        reaches: norms of that over the components (b x m).
        spans: norms of the 1, 2, 4, ... largest numbers in each column of ``between`` (levels x m).
        weight: outgoing of the second layer (m x c).
        linear: the change for each component while no unit flips and the second layer is the reference (b x c x r).
        samples: of each tile (t,); ``shares``: t x r x TILE.
        out: the changes (t x c x TILE).
        threads: each takes every so many tiles.
    """
    n, m, r, c = z.shape[1], z_next.shape[1], shares.shape[1], weight.shape[1]
    zero, slack, columns, components = z.dtype.type(0), z.dtype.type(SLACK), np.arange(c), np.arange(r)
    for thread in prange(threads):
        flip, shift = np.empty((n, TILE), z.dtype), np.empty((m, TILE), z.dtype)
        chosen, later = np.empty(n, np.int64), np.empty(m, np.int64)
        space = np.empty((BLOCK + TILE) * max(m, c), z.dtype)
        size, flipped = np.zeros(TILE, z.dtype), np.zeros(TILE, np.int64)
        for tile in range(thread, len(samples), threads):
            p, total, share = samples[tile], out[tile], shares[tile]
            count, reach = _flips(share, z[p], right, lengths, chosen, flip)
            np.dot(linear[p], share, total)
            _add(total, behind, chosen[:count], columns, flip, space)
            size[:], flipped[:] = 0, 0
            for i in range(count):
                for j in range(TILE):
                    size[j] += flip[i, j] * flip[i, j]
                    flipped[j] += flip[i, j] > 0
            # units of the second layer that may leave the reference
            length, level = np.sqrt(size.max()) * slack, 0
            while (1 << level) < flipped.max():
                level += 1
            span, needed = spans[min(level, len(spans) - 1)], 0
            for v in range(m):
                later[needed] = v
                outside = -z_next[p, v] if reference[v] else z_next[p, v]
                needed += outside + reach * reaches[p, v] + length * span[v] >= 0
            units, moved = later[:needed], shift[:needed]
            moved[:] = 0
            _add(moved, basis[p], components, units, share, space)
            _add(moved, between, chosen[:count], units, flip, space)
            for i in range(needed):
                v = units[i]
                at, base, kept = z_next[p, v], max(z_next[p, v], zero), z.dtype.type(reference[v])
                for j in range(TILE):
                    moved[i, j] = max(at + moved[i, j], zero) - base - kept * moved[i, j]
            _add(total, weight, units, columns, moved, space)
