"""Compiled loops for exact changes behind ReLU layers (extra ``numba``); :mod:`slrprop.relevance.alike` calls them.

A *reference* is a mask r of active units. With it, the layers behind an injection are one matrix; a unit at z that moves by d
adds ``relu(z + d) - relu(z) - r d`` to that, which is zero unless its sign is not the reference's, or flips. Which units these
are is found by bounds, for every sample and tile of candidates; their lists end with the index behind the last unit,
whose weights are zeros, to fill a group.
"""

import numpy as np
from numba import njit, prange

from slrprop.relevance.alike import SLACK, TILE

UNITS = 8  # units that are added up at once
LINE = 64  # bytes of a cache line
FAST = {"contract", "nsz", "reassoc"}


@njit(inline="always", fastmath=FAST)
def _add(total, moved, rows, columns, weight):  # type: ignore[no-untyped-def]
    """``total[k] += sum_i weight[rows[i], columns[k]] * moved[i]`` for UNITS rows; an even number of columns."""
    w0, w1, w2, w3 = weight[rows[0]], weight[rows[1]], weight[rows[2]], weight[rows[3]]
    w4, w5, w6, w7 = weight[rows[4]], weight[rows[5]], weight[rows[6]], weight[rows[7]]
    for k in range(0, len(columns), 2):
        m, n = columns[k], columns[k + 1]
        a0, a1, a2, a3, a4, a5, a6, a7 = w0[m], w1[m], w2[m], w3[m], w4[m], w5[m], w6[m], w7[m]
        b0, b1, b2, b3, b4, b5, b6, b7 = w0[n], w1[n], w2[n], w3[n], w4[n], w5[n], w6[n], w7[n]
        for j in range(TILE):
            x0, x1, x2, x3 = moved[0, j], moved[1, j], moved[2, j], moved[3, j]
            x4, x5, x6, x7 = moved[4, j], moved[5, j], moved[6, j], moved[7, j]
            y = total[k, j] + a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3 + a4 * x4 + a5 * x5 + a6 * x6 + a7 * x7
            z = total[k + 1, j] + b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3 + b4 * x4 + b5 * x5 + b6 * x6 + b7 * x7
            total[k, j] = y
            total[k + 1, j] = z


@njit(cache=True)
def _filled(units, count, every):  # type: ignore[no-untyped-def]
    """The first ``count`` units and what fills their last group."""
    whole = -(-count // UNITS) * UNITS
    units[count:whole] = every
    return units[:whole]


@njit(cache=True)
def _space(like, *shape):  # type: ignore[no-untyped-def]
    """Zeros that begin at a cache line."""
    size = 1
    for count in shape:
        size *= count
    whole = np.zeros(size + LINE, like.dtype)
    first = -whole.ctypes.data % LINE // like.itemsize
    return whole[first : first + size].reshape(shape)


@njit(parallel=True, fastmath=FAST, cache=True)
def one_layer(z, reference, ends, likely, units, s, direction, candidates, weight, linear, out, threads):  # type: ignore[no-untyped-def]
    """What follows one ReLU layer changes by, for injections ``s[p, i] * direction[:, i]`` into it.

    Args:
        z: pre-activations of the u units that may be needed, and a column of zeros (b x u + 1).
        reference: whether each is active there, and False (u + 1,).
        likely: the units that any candidate may need, sample by sample; ``ends``: how many up to each sample's last (b,).
        units: which rows of ``direction`` (n x m) they are.
        s: b x (tiles * TILE), zeros where there is no candidate.
        candidates: columns of ``direction``, in the order of ``s``.
        weight: outgoing, and a row of zeros (u + 1 x c); c is even.
        linear: the change by the reference for s = 1 (tiles x c x TILE).
        out: the changes, zeros before (b x tiles x c x TILE).
        threads: each takes every so many tiles.
    """
    b, every, c, zero = len(z), len(units), weight.shape[1], z.dtype.type(0)
    columns = np.arange(c)
    near, peaks = _space(z, threads, every, TILE), np.zeros((threads, every), z.dtype)
    changes, lists = _space(z, threads, UNITS, TILE), np.zeros((threads, every + UNITS), np.int64)
    for thread in prange(threads):
        rows, peak, moved, needed = near[thread], peaks[thread], changes[thread], lists[thread]
        for tile in range(thread, len(linear), threads):
            here = candidates[tile * TILE : (tile + 1) * TILE]
            for u in range(every):
                source, top = direction[units[u]], zero
                for j in range(TILE):
                    rows[u, j] = source[here[j]]
                    top = max(top, abs(rows[u, j]))
                peak[u] = top * z.dtype.type(SLACK)
            for p in range(b):
                scale, total = s[p, tile * TILE : (tile + 1) * TILE], out[p, tile]
                reach = np.abs(scale).max()
                if reach == 0:
                    continue
                for k in range(c):
                    for j in range(TILE):
                        total[k, j] = scale[j] * linear[tile, k, j]
                count = 0
                for place in range(ends[p - 1] if p else 0, ends[p]):
                    u = likely[place]
                    needed[count] = u
                    count += (-z[p, u] if reference[u] else z[p, u]) + reach * peak[u] >= 0
                chosen = _filled(needed, count, every)
                for first in range(0, len(chosen), UNITS):
                    for i in range(UNITS):
                        u = chosen[first + i]
                        if u == every:
                            moved[i] = 0
                            continue
                        at, row = z[p, u], rows[u]
                        base, kept = max(at, zero), z.dtype.type(reference[u])
                        for j in range(TILE):
                            d = scale[j] * row[j]
                            moved[i, j] = max(at + d, zero) - base - kept * d
                    _add(total, moved, chosen[first : first + UNITS], columns, weight)


@njit(parallel=True, fastmath=FAST, cache=True)
def two_layers(  # type: ignore[no-untyped-def]
    z, right, lengths, behind, between, z_next, reference, basis, reaches, spans, weight, s, left, linear, out, threads
):
    """What follows two ReLU layers changes by, for injections ``s[p, i] * left[:, i] @ right`` into the first.

    Args:
        z: pre-activations of the first layer (b x n).
        right: n + 1 x r, zeros at the end; ``lengths``: their norms (n,).
        behind: what an output of the first layer adds by the reference of the second, zeros at the end (n + 1 x c); c is even.
        between: weights from the first to the second layer (n x m).
        z_next: pre-activations of the second layer (b x m).
        reference: whether its units are active there (m,).
        basis: what the second layer moves by for each component while no unit of the first flips (b x r x m).
        reaches: norms of that over the components (b x m).
        spans: norms of the 1, 2, 4, ... largest numbers in each column of ``between`` (levels x m).
        weight: outgoing of the second layer, transposed (c x m).
        s: b x (tiles * TILE), zeros where there is no candidate; ``left``: r x (tiles * TILE).
        linear: the change for each component while no unit flips and the second layer is the reference (b x c x r).
        out: the changes (b x tiles x c x TILE).
        threads: each takes every so many samples' tiles.
    """
    b, n, m, r, c = len(z), z.shape[1], z_next.shape[1], len(left), len(weight)
    zero, slack, columns = z.dtype.type(0), z.dtype.type(SLACK), np.arange(c)
    shares, flips = _space(z, threads, r, TILE), _space(z, threads, n + UNITS, TILE)
    shifts, locals_ = _space(z, threads, TILE, m), _space(z, threads, r + c + 4, m)
    lists, lists_next = np.zeros((threads, n + UNITS), np.int64), np.zeros((threads, m), np.int64)
    tiles = s.shape[1] // TILE
    for thread in prange(threads):
        share, flip, shift, near = shares[thread], flips[thread], shifts[thread], locals_[thread]
        later, size, flipped = lists_next[thread], np.zeros(TILE, z.dtype), np.zeros(TILE, np.int64)
        for job in range(thread, b * tiles, threads):
            p, tile = job // tiles, job % tiles
            total, scale = out[p, tile], s[p, tile * TILE : (tile + 1) * TILE]
            total[:], size[:], flipped[:] = 0, 0, 0
            for q in range(r):
                for j in range(TILE):
                    share[q, j] = scale[j] * left[q, tile * TILE + j]
                    size[j] += share[q, j] * share[q, j]
            reach = np.sqrt(size.max()) * slack
            if reach == 0:
                continue
            for k in range(c):
                for q in range(r):
                    for j in range(TILE):
                        total[k, j] += linear[p, k, q] * share[q, j]
            # units of the first layer that may flip, and what that adds to their linear part
            count = 0
            for u in range(n):
                lists[thread, count] = u
                count += reach * lengths[u] >= abs(z[p, u])
            chosen = _filled(lists[thread], count, n)
            size[:] = 0
            for i in range(len(chosen)):
                u, one = chosen[i], flip[i]
                one[:] = 0
                if i >= count:
                    continue
                for q in range(r):
                    for j in range(TILE):
                        one[j] += right[u, q] * share[q, j]
                at = z[p, u]
                away = z.dtype.type(-1 if at > 0 else 1)
                for j in range(TILE):
                    one[j] = max(away * (at + one[j]), zero)
                    size[j] += one[j] * one[j]
                    flipped[j] += one[j] > 0
            for first in range(0, len(chosen), UNITS):
                _add(total, flip[first : first + UNITS], chosen[first : first + UNITS], columns, behind)
            # units of the second layer that may leave the reference, side by side
            length, level = np.sqrt(size.max()) * slack, 0
            while (1 << level) < flipped.max():
                level += 1
            span, needed = spans[min(level, len(spans) - 1)], 0
            for v in range(m):
                later[needed] = v
                outside = -z_next[p, v] if reference[v] else z_next[p, v]
                needed += outside + reach * reaches[p, v] + length * span[v] >= 0
            row, at, base, kept = near[r + c], near[r + c + 1], near[r + c + 2], near[r + c + 3]
            for i in range(needed):
                v = later[i]
                at[i], base[i], kept[i] = z_next[p, v], max(z_next[p, v], zero), reference[v]
                for q in range(r):
                    near[q, i] = basis[p, q, v]
                for k in range(c):
                    near[r + k, i] = weight[k, v]
            shift[:, :needed] = 0
            for j in range(TILE):
                for q in range(r):
                    for i in range(needed):
                        shift[j, i] += share[q, j] * near[q, i]
            for unit in range(count):
                source, one = between[chosen[unit]], flip[unit]
                if one.max() == 0:
                    continue
                for i in range(needed):
                    row[i] = source[later[i]]
                for j in range(TILE):
                    if one[j] > 0:
                        for i in range(needed):
                            shift[j, i] += one[j] * row[i]
            for j in range(TILE):
                moved = shift[j]
                for i in range(needed):
                    moved[i] = max(at[i] + moved[i], zero) - base[i] - kept[i] * moved[i]
                for k in range(0, c, 2):
                    even, odd = near[r + k], near[r + k + 1]
                    x = y = zero
                    for i in range(needed):
                        x += moved[i] * even[i]
                        y += moved[i] * odd[i]
                    total[k, j] += x
                    total[k + 1, j] += y
