"""Every layer's candidates, and the path of plans they make from the original to the smallest network."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slrprop.api import plan_problem
from slrprop.layers import linear_from
from slrprop.methods import Problem, find_method
from slrprop.methods.base import ranks_for
from slrprop.plan import LayerPlan, Plan

DEFAULT_METHODS: dict[str, dict[str, Any]] = {"svd": {}, "slr": {"criterion": "weight"}}
CALIBRATION_ROWS = 512  # inputs of each layer that predictions are made from
LEAST_STEP = 4096  # bytes between two points of one layer: more than a file needs around its numbers


@dataclass(frozen=True)
class Candidate:
    """One layer under one method and rank; ``layer`` None leaves it dense. ``error`` is relative, squared."""

    bytes: int
    error: float
    layer: LayerPlan | None = None


@dataclass(frozen=True)
class Evaluation:
    """A network, measured on the search part: ``quality`` in the metric's unit, ``divergence`` from the original.

    ``upper`` is the upper end of the drop's 95 % interval there (NaN: not known).
    """

    quality: float
    divergence: float
    bytes: int
    upper: float = math.nan


@dataclass(frozen=True)
class Point:
    """A plan on the path, and what was measured of it; ``latency`` in seconds, NaN where it was not timed."""

    step: int
    plan: Plan
    predicted_bytes: int
    predicted_damage: float
    measured: Evaluation | None = None
    latency: float = math.nan


def layer_inputs(problem: Problem, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Up to ``CALIBRATION_ROWS`` inputs of each layer (p x m), spread over the data."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for flow in problem.network.stream(names, problem.data):
        for name, calls in flow.calls.items():
            seen[name] += [x[:: max(1, len(x) // 128)].clone() for x, _ in calls]
    return {name: torch.cat(parts)[:: max(1, sum(map(len, parts)) // CALIBRATION_ROWS)] for name, parts in seen.items()}


def candidates_of(problem: Problem, name: str, x: Tensor, methods: Mapping[str, dict[str, Any]]) -> list[Candidate]:
    """All candidates of a layer, the dense one first."""
    weight = problem.weight(name).detach()
    m, n = weight.shape
    x = x.to(torch.promote_types(weight.dtype, torch.float32))
    y = x @ weight.to(x)
    found = [Candidate(weight.nbytes, 0.0)]
    ranks = ranks_for(m, n)
    if ranks:
        problem.svd(name, ranks[-1], "auto")  # the lower ranks are parts of it
    for method, settings in methods.items():
        if name not in find_method(method).settings(**settings).eligible(problem.network):
            continue  # for example a layer that SLRProp's chain does not reach
        for rank in ranks:
            made = plan_problem(problem, method, [name], rank=rank, **settings)
            for layer in made.layers:
                assert layer.factors is not None
                error = float(
                    (y - linear_from(layer.factors, None)(x).detach()).square().sum()
                    / y.square().sum().clamp_min(1e-30)
                )
                found.append(Candidate(layer.factors.bytes, error, layer))
    return found


def hull(candidates: list[Candidate]) -> list[Candidate]:
    """The lower convex hull of (bytes, error), from the largest (dense) to the smallest candidate."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-c.bytes, c.error)):
        while kept and kept[-1].bytes == candidate.bytes:
            candidate = min(kept.pop(), candidate, key=lambda c: c.error)
        while len(kept) >= 2 and _slope(kept[-2], kept[-1]) >= _slope(kept[-2], candidate):
            kept.pop()
        kept.append(candidate)
    return kept


def _slope(larger: Candidate, smaller: Candidate) -> float:
    """Error taken on per byte saved."""
    return (smaller.error - larger.error) / (larger.bytes - smaller.bytes)


def frontier(candidates: list[Candidate]) -> list[tuple[Candidate, float]]:
    """All candidates that none beats in both bytes and error, from the dense one down, each with its hull edge's slope.

    The slopes order the layers' moves; the points between two corners of the hull make the steps small.
    """
    corners = hull(candidates)
    found = [(corners[0], 0.0)]
    for larger, smaller in itertools.pairwise(corners):
        between = [c for c in candidates if smaller.bytes < c.bytes < larger.bytes]
        best: list[Candidate] = []
        for candidate in sorted(between, key=lambda c: (c.bytes, c.error)):
            if candidate.error < (best[-1].error if best else smaller.error):
                best.append(candidate)
        gap, slope = max(LEAST_STEP, corners[0].bytes // 50), _slope(larger, smaller)
        for candidate in reversed(best):
            if found[-1][0].bytes - candidate.bytes >= gap <= candidate.bytes - smaller.bytes:
                found.append((candidate, slope))
        found.append((smaller, slope))
    return found


def path_of(
    candidates: Mapping[str, list[Candidate]], sensitivity: Mapping[str, float], feeds: dict[str, str], rest: int
) -> list[Point]:
    """Plans from the original to the smallest, one layer moving one step along its frontier at a time.

    Args:
        rest: bytes of everything but these layers' weights.
    """
    steps = {name: frontier(found) for name, found in candidates.items()}
    place = dict.fromkeys(steps, 0)

    def point(step: int) -> Point:
        chosen = {name: steps[name][at][0] for name, at in place.items()}
        layers = tuple(candidate.layer for candidate in chosen.values() if candidate.layer is not None)
        planned = {layer.name for layer in layers}
        near = {first: second for first, second in feeds.items() if first in planned or second in planned}
        damage = sum(sensitivity[name] * candidate.error for name, candidate in chosen.items())
        return Point(step, Plan(layers, {}, near), rest + sum(c.bytes for c in chosen.values()), damage)

    points = [point(0)]
    while True:
        moves = [
            (sensitivity[name] * steps[name][at + 1][1], name)
            for name, at in place.items()
            if at + 1 < len(steps[name])
        ]
        if not moves:
            return points
        place[min(moves)[1]] += 1
        points.append(point(len(points)))
