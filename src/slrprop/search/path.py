"""Every layer's candidates, and the path of plans they make from the original to the smallest network."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from slrprop.api import finished, plan_problem, planned_layer
from slrprop.errors import SlrpropError
from slrprop.fit.quantize import TooLargeError
from slrprop.forms import Dense, LowRank
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
FAR = 2  # times the error: between two steps of a method that are so far behind others nothing is looked for
TOLERANCE = 0.05  # by which the logarithm of an error may be foretold wrongly before more is fitted
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

    @property
    def formless(self) -> bool:
        """Whether its form is not at hand: it was foretold, or is on no hull. It is fitted if it is chosen."""
        return self.layer is not None and self.layer.fit is None


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


class Rung(NamedTuple):
    """One step of a method's ladder: its numbers (where the data decide them none, or less for smaller steps), and its settings by the bits of a number."""

    numbers: int
    settings: dict[int, dict[str, Any]]


class Maker:
    """Makes a layer's candidates: some are fitted, and the errors of those between them foretold.

    A form's error is that of its product before rounding and what rounding adds. Where a method's product of rank k is the first k parts of
    a longer one (:meth:`~slrprop.methods.calibrated.CalibratedSettings.parts`) the former is known for all ranks at once; the rest runs
    smoothly with the numbers, and is interpolated between fits, of which there are more where that is off by more than ``tolerance``.

    Args:
        inputs: rows of what the layer reads (p x m), or the numbers of an embedding's rows.
        to_data: whether any method fits to data; errors are weighed by what they do to the network's outputs then, as far as that is known.
    """

    def __init__(self, name: str, problem: Problem, inputs: Tensor, to_data: bool, tolerance: float) -> None:
        self.name, self.problem, self.tolerance = name, problem, tolerance
        weight, self.operator = problem.weight(name).detach(), problem.network.operator(name)
        self.task = problem.calibration.regression(name, {}) if to_data else None
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.looked_up = isinstance(self.operator, Lookup)
        self.x = inputs if self.looked_up else inputs.to(self.wide)
        root = None if self.task is None else self.task.root
        self.root = None if root is None else root.to(self.wide)
        y = times(self.x, Dense(weight.to(self.wide)))
        self.y, self.bias = y, problem.network.bias(name)
        self.energy = max(self._weighed(y - y.mean(0) if to_data else y), 1e-30)
        self.found = [Candidate(problem.network.stored(name), 0.0)]

    def _weighed(self, y: Tensor) -> float:
        return float((y if self.root is None else y @ self.root).square().sum(dtype=torch.float64))

    def fit(self, method: str, settings: Mapping[str, Any]) -> Candidate | None:
        """A step's candidate; None where it is no smaller, or few bits can't hold its numbers."""
        try:
            made = plan_problem(self.problem, method, [self.name], **settings)
        except TooLargeError:  # other forms may hold such numbers
            return None
        layer = next((layer for layer in made.layers if layer.name == self.name), None)
        if layer is None or layer.fit is None:
            return None
        form, own, bias = layer.fit.form, layer.bias, self.bias
        moved = (0 if own is None else own.to(self.wide)) - (0 if bias is None or own is None else bias.to(self.wide))
        # forms have their own dtype and device
        rows = self.x if self.looked_up else self.x.to(next(iter(form.matrices().values())))
        error = self._weighed(self.y - times(rows, form).to(self.y) - moved) / self.energy
        return Candidate(self.problem.network.stored(self.name, layer.fit), error, layer)

    def _far(self, candidate: Candidate | None) -> bool:
        """Whether others of at most as many bytes have errors that are ``FAR`` times smaller."""
        if candidate is None:
            return True
        others = [other.error for other in self.found[1:] if other.bytes <= candidate.bytes]
        return candidate.error > FAR * min(others, default=math.inf)

    def _off(self, told: Candidate | None, candidate: Candidate) -> float:
        """How far the logarithm of an error was foretold wrongly."""
        return math.inf if told is None else abs(math.log(max(candidate.error, 1e-30) / max(told.error, 1e-30)))

    def add(self, method: str, rungs: Sequence[Rung]) -> None:
        """A method's candidates, of one or several widths of numbers; ``rungs`` from the fewest numbers to the most.

        The fewest and the middle one are fitted, and unless the latter is far behind other methods the most. Between two that are both far behind there is nothing to look for.
        """
        made: dict[int, dict[int, Candidate]] = {}  # by place and bits
        far: set[int] = set()

        def fit(at: int) -> None:
            fits = {bits: self.fit(method, settings) for bits, settings in rungs[at].settings.items()}
            made[at] = {bits: candidate for bits, candidate in fits.items() if candidate is not None}
            if all(map(self._far, fits.values())):
                far.add(at)

        first = dict.fromkeys((0, (len(rungs) - 1) // 2)) if rungs else ()
        for at in first:
            fit(at)
        if rungs and not far >= {*first}:
            if max(first) not in far and len(rungs) - 1 not in made:
                fit(len(rungs) - 1)
            errors = self._before_rounding(method, rungs)
            telling = self.tolerance >= 0 and refitted(method) and rungs[0].numbers > 0
            waiting = list(itertools.pairwise(sorted(made)))
            while waiting:
                low, high = waiting.pop()
                middle = (low + high) // 2
                if middle == low or far >= {low, high}:
                    continue
                widths = rungs[middle].settings if telling else ()
                told = {bits: self._told(made, rungs, errors, middle, bits) for bits in widths}
                fit(middle)
                off = [self._off(told.get(bits), candidate) for bits, candidate in made[middle].items()]
                if not off or max(off) > self.tolerance:
                    waiting += [(low, middle), (middle, high)]
            for at in range(max(made)):
                if at not in made and telling:
                    foretold = (self._told(made, rungs, errors, at, bits) for bits in rungs[at].settings)
                    made[at] = {c.layer.settings["bits"]: c for c in foretold if c is not None and c.layer is not None}
        self.found += [candidate for at in sorted(made) for candidate in made[at].values()]

    def settle(self) -> None:
        """Fit what is foretold on the hull, until nothing is; then let go of the forms elsewhere that can be fitted again, but for the largest of each kind."""
        while told := [candidate for candidate in hull(self.found) if candidate.formless]:
            for candidate in told:
                assert candidate.layer is not None
                at, made = self.found.index(candidate), self.fit(candidate.layer.method, candidate.layer.settings)
                self.found[at : at + 1] = [] if made is None else [made]
        largest = {kind_of(c.layer): c for c in sorted(self.found, key=BYTES) if c.layer is not None and not c.formless}
        held = {id(candidate) for candidate in [*hull(self.found), *largest.values()]}
        self.found = [
            c
            if c.layer is None or id(c) in held or not refitted(c.layer.method)
            else replace(c, layer=replace(c.layer, fit=None))
            for c in self.found
        ]

    def _before_rounding(self, method: str, rungs: Sequence[Rung]) -> list[float]:
        """The error of every rung's product before it is rounded, as far as it is known: else 0."""
        settings = [find_method(method).settings(**next(iter(rung.settings.values()))) for rung in rungs]
        if self.task is None or not isinstance(settings[-1], CalibratedSettings):
            return [0.0] * len(rungs)
        parts = settings[-1].parts(self.task)
        if parts is None:
            return [0.0] * len(rungs)
        left, right = parts[0].to(self.wide), parts[1].to(self.wide)
        rest, start, errors = self.y, 0, []
        for one in settings:
            stop: int = vars(one)["rank"]
            rest = rest - times(self.x, LowRank(left[:, start:stop], right[start:stop]))
            start = stop
            errors.append(self._weighed(rest if self.looked_up else rest - rest.mean(0)) / self.energy)
        return errors

    def _told(
        self,
        made: Mapping[int, dict[int, Candidate]],
        rungs: Sequence[Rung],
        errors: Sequence[float],
        at: int,
        bits: int,
    ) -> Candidate | None:
        """A candidate that is not fitted, from those that are on both sides of it; None where there are none."""
        known = {place: made[place][bits] for place in sorted(made) if bits in made[place]}
        if not known or not min(known) < at < max(known):
            return None
        numbers = [rungs[place].numbers for place in known]
        added = [math.log(max(c.error - errors[place], c.error / 1000, 1e-30)) for place, c in known.items()]
        rounding = math.exp(PchipInterpolator(np.log(numbers), added)(math.log(rungs[at].numbers)))
        size = int(np.interp(rungs[at].numbers, numbers, [c.bytes for c in known.values()]))
        near = known[min(known, key=lambda place: abs(place - at))].layer
        assert near is not None
        kind = find_method(near.method).settings(**rungs[at].settings[bits]).at(self.operator, near.shape)
        settings = {key: getattr(kind, key) for key in kind.names()}
        layer = LayerPlan(self.name, near.shape, near.fingerprint, near.method, settings, rungs[at].numbers, size)
        return Candidate(size, errors[at] + rounding, layer)


def refitted(method: str) -> bool:
    """Whether a plan's layer is fitted from nothing but its settings when the plan is carried out."""
    found = find_method(method)
    return isinstance(found, CalibratedMethod) and found.settings.by_settings


def candidates_of(
    name: str,
    problem: Problem,
    inputs: Mapping[str, Tensor],
    choices: Mapping[str, Sequence[Choice]],
    most: float = math.inf,
    every: int = 1,
    block: int = 1,
    tolerance: float = TOLERANCE,
) -> list[Candidate]:
    """All candidates of a layer, the dense one first; none whose numbers alone take more than ``most`` bytes.

    ``inputs`` are rows of what every layer reads, ``choices`` what is tried for it. Of each method's ladder the largest step and every ``every``-th
    below it are there, or all where ranks are cut down to whole blocks (:func:`slrprop.search.blocks.in_blocks`). Those that :class:`Maker` does not
    fit have settings and no form.

    ``error`` is of the layer's outputs there, weighed by what they do to the network's where that is known and any of
    the methods is calibrated.
    """
    methods, operator = choices[name], problem.network.operator(name)
    m, n = problem.network.shape(name)
    blind = bool(operator.bits_only)  # the weight's own error stands for the outputs'
    to_data = not blind and any(
        "inputs" in find_method(method).settings(**settings).needs() for method, settings in methods
    )
    maker = Maker(name, problem, torch.eye(m) if blind else inputs[name], to_data, tolerance)
    ranks = ranks_for(m, n)
    if ranks and any(method in ("svd", "slr", "slrprop") for method, _ in methods):
        problem.svd(name, ranks[-1], "auto")  # the lower ranks are parts of it
    for (method, _), alike in itertools.groupby(methods, lambda choice: (choice[0], choice[1] | {"bits": 0})):
        kind, rungs = find_method(method).settings, dict[int, Rung]()
        if find_method(method).coupled:
            raise SlrpropError(
                f"method '{method}' treats layers together, and the search chooses for each by itself; use slrprop.plan, or leave it out"
            )
        for _, given in alike:
            if name not in kind(**given).eligible(problem.network):
                continue  # for example a layer that SLRProp's chain does not reach
            alone = {"sequential": False} if issubclass(kind, CalibratedSettings) else {}
            ladder = kind.ladder(m, n)
            blocks = in_blocks(ladder, operator, (m, n), block)
            for place, step in enumerate(blocks[:: -every if blocks == ladder else -1]):
                settings = kind(**{**step, **alone, **given}).at(operator, (m, n))
                numbers = settings.stored_numbers(m, n) or -place
                size = max(numbers, 0) * min(settings.bits, 8 * problem.network.itemsize(name)) / 8
                if not settings.refusal(m, n) and size <= most:
                    rung = rungs.setdefault(numbers, Rung(numbers, {}))
                    rung.settings[settings.bits] = {**step, **alone, **given}
        maker.add(method, [rungs[numbers] for numbers in sorted(rungs)])
    maker.settle()
    give_back()
    return maker.found


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


def group_of(layer: LayerPlan) -> tuple[str, int, str]:
    """The method of a layer's form, the bits of its numbers, and the metric it was fitted in."""
    return layer.method, layer.settings["bits"], layer.settings.get("metric", "")


def kind_of(layer: LayerPlan) -> tuple[Any, ...]:
    """What tells forms apart that a file holds in other arrays."""
    return *group_of(layer), layer.settings.get("shape")


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
