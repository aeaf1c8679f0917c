"""Every layer's candidates, and the path of plans they make from the original to the smallest network."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from slrprop.api import finished, plan_problem, planned_layer
from slrprop.errors import SlrpropError
from slrprop.fit.quantize import TooLargeError
from slrprop.forms import Dense
from slrprop.memory import give_back
from slrprop.methods import METHODS, Method, Problem, Settings, find_method
from slrprop.methods.base import ranks_for
from slrprop.methods.calibrated import CalibratedMethod, CalibratedSettings, in_order
from slrprop.network.junction import Junction
from slrprop.operators import Lookup, times
from slrprop.plan import LayerPlan, Plan
from slrprop.search.blocks import in_blocks

Choice = tuple[str, dict[str, Any]]  # a method and settings of it
FEW_BITS: tuple[dict[str, Any], ...] = ({"bits": 8}, {"bits": 4})
LEVELS: dict[str, tuple[Choice, ...]] = {
    "weights": (
        ("svd", {}),
        ("slr", {"criterion": "weight"}),
        *(("svd", bits) for bits in FEW_BITS),
        *(("slr", {"criterion": "weight"} | bits) for bits in FEW_BITS),
        *(("rtn", bits) for bits in FEW_BITS),
    ),
    "calibrated": (
        *(("dense", bits) for bits in FEW_BITS),
        *(("spatial", bits) for bits in FEW_BITS),
        *(("tucker", bits) for bits in FEW_BITS),
        *(("low_rank", bits) for bits in FEW_BITS),
        ("low_rank", {"metric": "inputs", "bits": 4}),  # ahead where little is lost: LeNet-300-100 from 20 kB on
        *(("nested", {"shape": shape, "bits": 4, "sweeps": 2}) for shape in ("half", "third", "three-wide")),
    ),
}
LEVELS["tuned"] = LEVELS["calibrated"]
SIZE_ONLY: dict[str, tuple[Choice, ...]] = {  # what a level may use too where only the file's size counts
    "weights": (("magnitude", {"bits": 4}),),
    "calibrated": tuple(("obs", bits) for bits in FEW_BITS),
}
SIZE_ONLY["tuned"] = SIZE_ONLY["calibrated"]
QUICK: dict[str, dict[str, Any]] = {"slr": {"criterion": "weight"}}  # settings of methods named without any
MANY_LAYERS = 12  # with more, only every third step of each ladder is tried: so many layers make fine steps together
SPARSELY = 3
FAR = 1.5  # times the error: a method so far behind others with its largest and its middle step is not tried at its other ones
CALIBRATION_ROWS = 512  # inputs of each layer that predictions are made from


@dataclass(frozen=True)
class Candidate:
    """One layer under one method and rank; ``layer`` None leaves it dense. ``error`` is relative, squared.

    ``seconds`` are those of one sample in ONNX Runtime (NaN: not timed, where latency is no goal).
    """

    bytes: int
    error: float
    layer: LayerPlan | None = None
    seconds: float = math.nan


Cost = Callable[[Candidate], float]  # what a candidate takes of a budget
BYTES: Cost = attrgetter("bytes")


@dataclass(frozen=True)
class Evaluation:
    """A network, measured on the choosing part: ``quality`` in the metric's unit, ``divergence`` from the original.

    ``upper`` is the upper end of the drop's interval, as wide as on the check part (NaN: not known).
    """

    quality: float
    divergence: float
    bytes: int
    upper: float = math.nan


@dataclass(frozen=True)
class Point:
    """A plan on the path, and what was measured of it; ``latency`` in seconds, NaN where it was not timed."""

    plan: Plan
    predicted_bytes: int
    predicted_damage: float
    measured: Evaluation | None = None
    latency: float = math.nan


def layer_inputs(problem: Problem, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Up to ``CALIBRATION_ROWS`` inputs of each layer (p x m), spread over the data."""
    seen = {
        name: torch.empty(0, dtype=torch.long)
        if isinstance(problem.network.operator(name), Lookup)
        else problem.weight(name).new_empty(0, problem.network.shape(name)[0])
        for name in names
    }
    apart = dict.fromkeys(names, 1)  # of so many rows one is taken
    looked = tuple(name for name in names if not problem.network.operator(name).bits_only)
    for flow in problem.network.stream(looked, problem.data, whole=False) if looked else ():
        for name, calls in flow.calls.items():
            for x, _ in calls:
                seen[name] = torch.cat([seen[name], x[:: apart[name] * max(1, len(x) // 128)]])
                if len(seen[name]) > 2 * CALIBRATION_ROWS:
                    seen[name], apart[name] = seen[name][::2].clone(), 2 * apart[name]
    for name, rows in seen.items():
        seen[name] = rows[:: max(1, len(rows) // CALIBRATION_ROWS)].clone()
    give_back()
    return seen


def candidates_of(
    name: str,
    problem: Problem,
    inputs: Mapping[str, Tensor],
    choices: Mapping[str, Sequence[Choice]],
    most: float = math.inf,
    every: int = 1,
    block: int = 1,
) -> list[Candidate]:
    """All candidates of a layer, the dense one first; none whose numbers alone take more than ``most`` bytes.

    ``inputs`` are rows of what every layer reads, ``choices`` what is tried for it. Of each method's ladder the largest step and every ``every``-th
    below it are made, or all where ranks are cut down to whole blocks (:func:`slrprop.search.blocks.in_blocks`); of one whose largest and middle
    step come out ``FAR`` behind what others make of as many bytes, only these and the smallest.

    ``error`` is of the layer's outputs there, weighed by what they do to the network's where that is known and any of
    the methods is calibrated.
    """
    weight, methods = problem.weight(name).detach(), choices[name]
    m, n = weight.shape
    blind = bool(problem.network.operator(name).bits_only)  # the weight's own error stands for the outputs'
    x, looked_up = torch.eye(m) if blind else inputs[name], isinstance(problem.network.operator(name), Lookup)
    wide = torch.promote_types(weight.dtype, torch.float32)
    x = x if looked_up else x.to(wide)
    to_data = not blind and any(
        "inputs" in find_method(method).settings(**settings).needs() for method, settings in methods
    )
    root = problem.calibration.regression(name, {}).root if to_data else None
    root = None if root is None else root.to(wide)
    bias = problem.network.bias(name)

    def weighed(y: Tensor) -> float:
        return float((y if root is None else y @ root).square().sum(dtype=torch.float64))

    y = times(x, Dense(weight.to(wide)))
    energy = max(weighed(y - y.mean(0) if to_data else y), 1e-30)
    ranks = ranks_for(m, n)
    if ranks and any(method in ("svd", "slr", "slrprop") for method, _ in methods):
        problem.svd(name, ranks[-1], "auto")  # the lower ranks are parts of it
    found = [Candidate(problem.network.stored(name), 0.0)]

    def fit(method: str, settings: Mapping[str, Any]) -> Candidate | None:
        """A step's candidate, one of all from now on; None where it is no smaller, or few bits can't hold its numbers."""
        try:
            made = plan_problem(problem, method, [name], **settings)
        except TooLargeError:  # other forms may hold such numbers
            return None
        layer = next((layer for layer in made.layers if layer.name == name), None)
        if layer is None or layer.fit is None:
            return None
        factors, own = layer.fit.form, layer.bias
        moved = (0 if own is None else own.to(wide)) - (0 if bias is None or own is None else bias.to(wide))
        # factors have their own dtype and device
        rows = x if looked_up else x.to(next(iter(factors.matrices().values())))
        error = weighed(y - times(rows, factors).to(y) - moved) / energy
        found.append(Candidate(problem.network.stored(name, layer.fit), error, layer))
        return found[-1]

    for _, alike in itertools.groupby(methods, lambda choice: (choice[0], choice[1] | {"bits": 0})):
        rest: list[tuple[int, str, dict[str, Any]]] = []
        for method, given in alike:
            kind = find_method(method).settings
            if find_method(method).coupled:
                raise SlrpropError(
                    f"method '{method}' treats layers together, and the search chooses for each by itself; use slrprop.plan, or leave it out"
                )
            if name not in kind(**given).eligible(problem.network):
                continue  # for example a layer that SLRProp's chain does not reach
            alone = {"sequential": False} if issubclass(kind, CalibratedSettings) else {}
            operator, ladder = problem.network.operator(name), kind.ladder(m, n)
            blocks, steps = in_blocks(ladder, operator, (m, n), block), []
            for step in blocks[:: -every if blocks == ladder else -1]:
                settings = kind(**{**step, **alone, **given}).at(operator, (m, n))
                size = (settings.stored_numbers(m, n) or 0) * min(settings.bits, 8 * problem.network.itemsize(name)) / 8
                if not settings.refusal(m, n) and size <= most:
                    steps.append({**step, **alone, **given})
            early = [fit(method, steps.pop(place)) for place in (0, (len(steps) - 1) // 2, -1) if steps]
            if any(not c or c.error <= FAR * min(o.error for o in found[1:] if o.bytes <= c.bytes) for c in early[:2]):
                rest += [(place, method, step) for place, step in enumerate(steps)]
        for _, method, step in sorted(rest, key=itemgetter(0)):  # by place: a form in several widths is fitted once
            fit(method, step)
    give_back()
    return found


def fitted(problem: Problem, plan: Plan, sequential: bool, known: dict[tuple[Any, ...], LayerPlan]) -> Plan:
    """The plan with its calibrated layers fitted in order, each on the outputs of those before it.

    What is ``known`` of layers so fitted, by all that is planned up to them, is fitted once for all plans that begin alike.
    """
    chosen: dict[str, tuple[Method, Settings]] = {}
    fixed: dict[str, LayerPlan] = {}
    places: dict[str, tuple[Any, ...]] = {}
    for layer in plan.layers:
        method = METHODS[layer.method]
        places[layer.name] = place = (*list(places.values())[-1:], Plan((layer,)).to_json())
        if not isinstance(method, CalibratedMethod):
            fixed[layer.name] = layer
        elif place in known:
            fixed[layer.name] = known[place]
        else:
            settings = method.settings(**layer.settings | {"sequential": sequential})
            chosen[layer.name] = (method.anew(layer), settings)
    if all(layer is fixed.get(layer.name) for layer in plan.layers):
        return plan
    layers: dict[str, LayerPlan] = dict(fixed)
    for decision in in_order(problem, chosen, fixed):  # type: ignore[arg-type]
        used, own = chosen.get(decision.name, (METHODS["dense"], None))
        now = own or decision.settings
        assert now is not None
        layers[decision.name] = planned_layer(problem, decision, used, now)
        if own is not None:
            known[places[decision.name]] = layers[decision.name]
    return finished(problem.network, layers, plan.left_dense)


def hull(candidates: list[Candidate], cost: Cost = BYTES) -> list[Candidate]:
    """The lower convex hull of (cost, error), from the largest (dense) to the smallest candidate."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-cost(c), c.error)):
        while kept and cost(kept[-1]) == cost(candidate):
            candidate = min(kept.pop(), candidate, key=lambda c: c.error)
        while len(kept) >= 2 and _slope(kept[-2], kept[-1], cost) >= _slope(kept[-2], candidate, cost):
            kept.pop()
        kept.append(candidate)
    return kept


def _slope(larger: Candidate, smaller: Candidate, cost: Cost) -> float:
    """Error taken on per byte, or what else counts, saved."""
    return (smaller.error - larger.error) / (cost(larger) - cost(smaller))


def frontier(candidates: list[Candidate], cost: Cost = BYTES) -> list[tuple[Candidate, float]]:
    """All candidates that none beats in both cost and error, from the dense one down, each with its hull edge's slope.

    The slopes order the layers' moves; the points between two corners of the hull make the steps small.
    """
    corners = hull([c for c in candidates if c.layer is None or cost(c) < cost(candidates[0])], cost)
    found = [(corners[0], 0.0)]
    for larger, smaller in itertools.pairwise(corners):
        best = undominated([smaller, *(c for c in candidates if cost(smaller) < cost(c) < cost(larger))], cost)[:-1]
        gap, slope = cost(corners[0]) / 50, _slope(larger, smaller, cost)
        for candidate in best:
            if cost(found[-1][0]) - cost(candidate) >= gap <= cost(candidate) - cost(smaller):
                found.append((candidate, slope))
        found.append((smaller, slope))
    return found


def path_of(
    candidates: Mapping[str, list[Candidate]],
    sensitivity: Mapping[str, float],
    junctions: tuple[Junction, ...],
    rest: int,
    cost: Cost = BYTES,
) -> list[Point]:
    """Plans from the original to the one of least cost, one layer moving one step along its frontier at a time.

    Args:
        rest: bytes of everything but these layers' weights.
    """
    steps = {name: frontier(found, cost) for name, found in candidates.items()}
    place = dict.fromkeys(steps, 0)

    def point() -> Point:
        chosen = {name: steps[name][at][0] for name, at in place.items()}
        layers = tuple(candidate.layer for candidate in chosen.values() if candidate.layer is not None)
        planned = {layer.name for layer in layers}
        near = tuple(junction for junction in junctions if not planned.isdisjoint(junction.layers))
        damage = sum(sensitivity[name] * candidate.error for name, candidate in chosen.items())
        return Point(Plan(layers, {}, near), rest + sum(c.bytes for c in chosen.values()), damage)

    points = [point()]
    while True:
        moves = [
            (sensitivity[name] * steps[name][at + 1][1], name)
            for name, at in place.items()
            if at + 1 < len(steps[name])
        ]
        if not moves:
            return points
        place[min(moves)[1]] += 1
        points.append(point())


def group_of(candidate: Candidate) -> tuple[str, int, str]:
    """The method of a candidate that is not the dense one, the bits of its numbers, and the metric it was fitted in."""
    assert candidate.layer is not None
    settings = candidate.layer.settings
    return candidate.layer.method, settings["bits"], settings.get("metric", "")


def undominated(candidates: Sequence[Candidate], cost: Cost = BYTES) -> list[Candidate]:
    """The candidates that none beats in both cost and error, from the largest to the smallest."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (cost(c), c.error)):
        if not best or candidate.error < best[-1].error:
            best.append(candidate)
    return best[::-1]


def best_places(
    steps: Mapping[str, list[Candidate]], sensitivity: Mapping[str, float], limit: int
) -> dict[str, int] | None:
    """For every layer the place among its candidates: least predicted damage within a limit of bytes in all.

    A price for bytes is found by bisection; what is left over goes where it saves the most damage.
    """

    def at_price(price: float) -> dict[str, int]:
        return {
            name: min(range(len(found)), key=lambda i: sensitivity[name] * found[i].error + price * found[i].bytes)
            for name, found in steps.items()
        }

    def size(place: Mapping[str, int]) -> int:
        return sum(steps[name][at].bytes for name, at in place.items())

    place = {name: len(found) - 1 for name, found in steps.items()}
    if size(place) > limit:
        return None
    low, high = 1e-18, 1e3
    for _ in range(60):
        price = math.sqrt(low * high)
        found = at_price(price)
        low, high = (low, price) if size(found) <= limit else (price, high)
        place = found if size(found) <= limit else place
    while True:
        left = limit - size(place)
        moves = []
        for name, at in place.items():
            for i in range(at):
                extra = steps[name][i].bytes - steps[name][at].bytes
                if extra <= left:
                    moves.append((sensitivity[name] * (steps[name][at].error - steps[name][i].error), name, i))
        if not moves:
            return place
        _, name, i = max(moves)
        place = place | {name: i}


def neighbours(steps: Mapping[str, list[Candidate]], place: Mapping[str, int], limit: int) -> list[dict[str, int]]:
    """Choices within the limit where one layer is a step smaller and another takes what that leaves, or has another form."""
    found = []
    for giver, at in place.items():
        if at + 1 >= len(steps[giver]):
            continue
        smaller = dict(place) | {giver: at + 1}
        left = limit - sum(steps[name][i].bytes for name, i in smaller.items())
        for taker in place:
            if taker == giver:
                continue
            fits = [i for i in range(place[taker]) if steps[taker][i].bytes - steps[taker][place[taker]].bytes <= left]
            if fits:
                found.append(smaller | {taker: fits[0]})
    return found
