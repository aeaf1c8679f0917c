"""The path of plans, and what is known of it."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from numbers import Real

from tqdm.auto import tqdm

from slrprop.api import feeds_between, finished, plan_problem
from slrprop.errors import SlrpropError
from slrprop.methods import Problem, find_method
from slrprop.methods.base import WIDEST
from slrprop.parallel import each
from slrprop.plan import Plan
from slrprop.search.judge import Door, Judge, Log
from slrprop.search.observed import Observed, observed
from slrprop.search.path import (
    LEAST_STEP,
    MANY_LAYERS,
    SPARSELY,
    Candidate,
    Choice,
    Evaluation,
    Point,
    best_places,
    candidates_of,
    fitted,
    group_of,
    hull,
    layer_inputs,
    neighbours,
    path_of,
    stored_bytes,
    undominated,
)
from slrprop.search.result import Budget, most_evaluations, parse_size
from slrprop.tune import TuneSettings, distilled

REFINEMENTS = 3  # evaluations beyond those on the path
LIKELY = 2  # of the methods that are tried alone on wide layers, how many are fitted in order


class Search:
    """The path of plans and what is known of it.

    Args:
        methods: methods and settings that candidates are made by.
        tuning: tune every plan that is measured; None does not.
        workers: processes, and ``cluster`` a Ray cluster, that share the layers' candidates (:func:`slrprop.parallel.each`).
    """

    def __init__(
        self,
        door: Door,
        judge: Judge,
        problem: Problem,
        log: Log,
        methods: tuple[Choice, ...],
        confident: bool = False,
        tuning: TuneSettings | None = None,
        workers: int = 1,
        cluster: str | None = None,
    ) -> None:
        self.workers, self.cluster = workers, cluster
        self.door, self.judge, self.problem, self.log = door, judge, problem, log
        self.methods, self.confident, self.tuning = methods, confident, tuning
        self.calibrated = any("inputs" in find_method(name).settings(**given).needs() for name, given in methods)
        self.sequential = all(settings.get("sequential", True) for _, settings in methods)
        self._finals: dict[str, Plan] = {}
        self._known: dict[str, Evaluation] = {}
        self.evaluations = 1  # the original's
        self.points: list[Point] = []
        self.curves: dict[str, list[Candidate]] = {}
        self.sensitivity: dict[str, float] = {}
        self.left_dense: dict[str, str] = {}

    def _key(self, what: str, plan: Plan) -> str:
        what += " with integer products" * self.door.integer_products
        content = f"{what} {self.judge.fingerprint} {self.judge.metric} {plan.to_json()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def final(self, plan: Plan) -> Plan:
        """A plan of candidates as it is carried out: its calibrated layers fitted one after the other, then tuned if asked."""
        key = plan.to_json()
        if key not in self._finals:
            found = fitted(self.problem, plan, self.sequential)
            if self.tuning is not None and found.layers:
                found = distilled(self.problem.network, self.problem.data, found, self.tuning)
            self._finals[key] = self._finals[found.to_json()] = found
        return self._finals[key]

    def evaluate(self, plan: Plan) -> Evaluation:
        """Run a plan's network over the search part."""
        if not plan.layers:
            made = self.door.realise(plan)
            return Evaluation(self.judge.quality(made, self.judge.original), 0.0, self.door.size(made))
        key = plan.to_json()
        if key not in self._known:
            self._known[key] = self._measure(plan)
        return self._known[key]

    def _measure(self, plan: Plan) -> Evaluation:
        self.evaluations += 1

        def measure() -> dict[str, float]:
            made = self.door.realise(plan)
            outputs = self.judge.outputs(made)
            quality, divergence = self.judge.quality(made, outputs), self.judge.divergence(outputs)
            upper = math.nan if self.judge.own else self.judge.interval(outputs)[1]
            return asdict(Evaluation(quality, divergence, self.door.size(made), upper))

        if self.judge.own is not None:  # nobody knows whether the user's measure is still the same
            return Evaluation(**measure())  # type: ignore[arg-type]
        return Evaluation(**self.log.get(self._key("quality", plan), measure))  # type: ignore[arg-type]

    def latency(self, plan: Plan) -> float:
        """Seconds for one sample: the original's, times how much longer than it the plan took in one interleaved run."""
        pair = {"original": Plan(()), "plan": plan}
        times = self.log.get(self._key("latency", plan), lambda: self.door.latencies(pair))
        if not plan.layers:
            return times["original"]
        return self.latency(Plan(())) * times["plan"] / times["original"]

    def latency_limit(self, milliseconds: float | None, share: str | None) -> float | None:
        """The stricter of both, in seconds."""
        limits = []
        if milliseconds is not None:
            if not isinstance(milliseconds, Real) or not 0 < float(milliseconds) < math.inf:
                raise SlrpropError(f"max_latency_ms must be a positive number of milliseconds, got {milliseconds!r}")
            limits.append(float(milliseconds) / 1e3)
        if share is not None:
            if not str(share).strip().endswith("%"):
                raise SlrpropError(
                    f"max_latency is a share of the original's, like '50%', got {share!r}; use max_latency_ms for milliseconds"
                )
            limits.append(parse_size(share, 1e9 * self.latency(Plan(())), "max_latency") / 1e9)
        return min(limits, default=None)

    def explore(self, layers: str | list[str] | None, most: float = math.inf) -> None:
        """Candidates of every layer (up to ``most`` bytes each), their sensitivities, and the path they make."""
        probe = plan_problem(self.problem, "svd", layers, rank=1)
        names = tuple(layer.name for layer in probe.layers)
        if not names:
            raise SlrpropError(
                f"no layer can be made smaller ({'; '.join(f'{k}: {v}' for k, v in probe.left_dense.items())})"
            )
        if self.calibrated:
            self.problem.calibration.prepare(names)
        inputs = layer_inputs(self.problem, names)
        every = SPARSELY if len(names) > MANY_LAYERS else 1
        shared = self.problem, inputs, self.methods, most, every
        made = each(candidates_of, names, shared, self.workers, self.cluster)
        found = dict(tqdm(made, total=len(names), desc="candidates", unit="layer", disable=None))
        self.curves = {name: found[name] for name in names}
        hulls = {name: hull(found) for name, found in self.curves.items()}
        self.left_dense = probe.left_dense
        self.sensitivity = sensitivity = dict.fromkeys(names, 1.0)
        for name in tqdm(names if len(names) > 1 else (), desc="sensitivities", unit="layer", disable=None):
            middle = hulls[name][len(hulls[name]) // 2]
            if middle.layer is not None and middle.error > 0:
                alone = Plan((middle.layer,))
                sensitivity[name] = max(self.evaluate(alone).divergence, 1e-12) / middle.error
        self._make_path()

    def _make_path(self) -> None:
        network, names = self.problem.network, tuple(self.curves)
        rest = self.door.size(self.door.realise(Plan(()))) - sum(curve[0].bytes for curve in self.curves.values())
        self.points = path_of(self.curves, self.sensitivity, feeds_between(network, names), rest)

    def leave_slower_dense(self, at: int) -> bool:
        """Take from the path every layer whose form at this point runs slower alone than the original network."""
        plan = self.points[at].plan
        alone = {layer.name: replace(plan, layers=(layer,)) for layer in plan.layers if layer.name in self.curves}

        def measure() -> dict[str, float]:
            return self.door.latencies({"": Plan(()), **alone})

        times = self.log.get(self._key("layers", plan), measure)
        slower = [name for name in alone if times[name] > times[""]]
        for name in slower:
            self.curves[name] = self.curves[name][:1]
            self.left_dense = self.left_dense | {
                name: f"its form ran {times[name] / times['']:.2f} times as long as the original network"
            }
        if slower:
            self._make_path()
        return bool(slower)

    def observed(self, plan: Plan) -> dict[str, Observed]:
        """What is known of every layer that has candidates, now that this plan was chosen."""
        chosen = {layer.name: layer for layer in plan.layers}
        found = {}
        for name, curve in self.curves.items():
            layers = [candidate.layer for candidate in curve if candidate.layer is not None]
            rank = max((layer.settings["rank"] for layer in layers if "solver" in layer.settings), default=0)
            found[name] = observed(self.problem, name, rank, self.sensitivity[name], chosen.get(name))
        return found

    def timed(self, at: int) -> float:
        """The point's latency, measured if it is missing."""
        self.points[at] = replace(self.points[at], latency=self.latency(self.final_at(at)))
        return self.points[at].latency

    def measured(self, at: int) -> Evaluation:
        """The point's evaluation, made if it is missing."""
        found = self.points[at].measured or self.evaluate(self.final_at(at))
        self.points[at] = replace(self.points[at], measured=found)
        return found

    def size_at(self, at: int) -> int:
        """Bytes of the point's network; it is not run for that."""
        known = self.points[at].measured
        return known.bytes if known is not None else self.door.size(self.door.realise(self.final_at(at)))

    def final_at(self, at: int) -> Plan:
        """The point's plan as it is carried out."""
        self.points[at] = replace(self.points[at], plan=self.final(self.points[at].plan))
        return self.points[at].plan

    def within(self, limit: int, tries: int, each: bool = False) -> tuple[Plan, Evaluation] | None:
        """The best plan found whose layers' stored bytes are at most ``limit``; None where none is that small.

        From the choice of least predicted damage, one layer gives bytes to another as long as the measured divergence falls.

        Args:
            tries: evaluations at most.
            each: start from the best of that choice and of those of each method alone, which takes one evaluation more each
                (and ``LIKELY`` more where layers are wide).
        """
        best: tuple[Plan, Evaluation] | None = None
        steps, place, target = {}, {}, limit
        for group in self._starts(limit) if each else self._groups()[:1]:
            started = self._start(group, limit)
            if started is None:
                continue
            found, plan, most = started
            measured = self.evaluate(plan)
            if best is None or self.better(measured, best[1]):
                best, steps, place, target = (plan, measured), group, found, most
        seen = {tuple(place.values())}
        for _ in range(tries - 1 if best is not None else 0):
            near = [other for other in neighbours(steps, place, target) if tuple(other.values()) not in seen]
            if not near or best is None:
                break
            other = min(near, key=lambda at: self._damage(steps, at))
            seen.add(tuple(other.values()))
            plan = self._planned(steps, other)
            if self.stored(plan) <= limit:
                measured = self.evaluate(plan)
                if self.better(measured, best[1]):
                    place, best = other, (plan, measured)
        return best

    def better(self, one: Evaluation, other: Evaluation) -> bool:
        """Whether a measurement is better: by the metric where it differs by more than chance would, else by the divergence."""
        gain = (one.quality - other.quality) * (-1 if self.judge.lower_is_better else 1)
        chance = (
            math.inf
            if self.judge.metric == "squared_error" or self.judge.own
            else 100 / math.sqrt(len(self.judge.original))
        )
        return gain > 0 if abs(gain) > chance else one.divergence < other.divergence

    def _groups(self) -> list[dict[str, list[Candidate]]]:
        """All candidates that none beats, and those of each method and width of numbers alone: predictions compare them badly."""
        kinds = sorted({group_of(candidate) for curve in self.curves.values() for candidate in curve[1:]})
        groups = [{name: undominated(curve) for name, curve in self.curves.items()}]
        if len(kinds) > 1:
            for kind in kinds:
                alone = {
                    name: [c for c in curve if c.layer is None or group_of(c) == kind]
                    for name, curve in self.curves.items()
                }
                groups.append({name: undominated(curve) for name, curve in alone.items()})
        return groups

    def _starts(self, limit: int) -> list[dict[str, list[Candidate]]]:
        """The groups to start from; where layers are so wide that fitting them in order takes long, the ``LIKELY`` best without that."""
        groups = self._groups()
        if not self.wide or len(groups) <= LIKELY:
            return groups
        places = [(group, best_places(group, self.sensitivity, limit)) for group in groups]
        rated = [
            (self.evaluate(self._chosen(group, place)).divergence, index)
            for index, (group, place) in enumerate(places)
            if place is not None
        ]
        return [groups[index] for _, index in sorted(rated)[:LIKELY]]

    @property
    def wide(self) -> bool:
        """Whether layers are so wide that a fit takes seconds."""
        return any(max(self.problem.network.shape(name)) > WIDEST for name in self.curves)

    def _start(self, steps: dict[str, list[Candidate]], limit: int) -> tuple[dict[str, int], Plan, int] | None:
        """The choice of least predicted damage that really stores at most ``limit`` bytes, and the limit that led to it."""
        target = limit  # fitted in order, a form can be some bytes larger than its candidate: places of single weights
        while True:
            place = best_places(steps, self.sensitivity, target)
            if place is None:
                return None
            plan = self._planned(steps, place)
            over = self.stored(plan) - limit
            if over <= 0:
                return place, plan, target
            target -= over

    def stored(self, plan: Plan) -> int:
        """Bytes that the explored layers store under a plan."""
        planned = {layer.name: layer for layer in plan.layers}
        total = 0
        for name, curve in self.curves.items():
            layer = planned.get(name)
            if layer is None or layer.factors is None:
                total += curve[0].bytes
            else:
                bias = self.problem.network.bias(name) if layer.bias is None else layer.bias
                total += stored_bytes(layer.factors, bias)
        return total

    def _damage(self, steps: dict[str, list[Candidate]], place: dict[str, int]) -> float:
        return sum(self.sensitivity[name] * steps[name][at].error for name, at in place.items())

    def _chosen(self, steps: dict[str, list[Candidate]], place: dict[str, int]) -> Plan:
        """The candidates at these places as they are."""
        layers = {name: steps[name][at].layer for name, at in place.items()}
        known = {name: layer for name, layer in layers.items() if layer is not None}
        return finished(self.problem.network, known, {})

    def _planned(self, steps: dict[str, list[Candidate]], place: dict[str, int]) -> Plan:
        return self.final(self._chosen(steps, place))

    def drop(self, at: int) -> float:
        """How much worse than the original a point is on the search part; where asked, the upper end of that."""
        if self.confident:
            return self.measured(at).upper if self.points[at].plan.layers else 0.0
        change = self.measured(0).quality - self.measured(at).quality
        return -change if self.judge.lower_is_better else change

    def fits(self, at: int, budget: Budget) -> bool:
        """Whether a point is small and fast enough."""
        small = budget.max_bytes is None or self.measured(at).bytes <= budget.max_bytes
        return small and (budget.max_latency is None or self.timed(at) <= budget.max_latency)

    def _bisect(self, low: int, high: int, holds: Callable[[int], bool], steps: int) -> int:
        """The last index from ``low`` (holds) to ``high`` for which ``holds``, as far as ``steps`` trials can tell."""
        while low < high and steps:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if holds(middle) else (low, middle - 1)
            steps -= 1
        return low

    def choose(self, budget: Budget) -> tuple[int, bool]:
        """The point to promise, and whether it is in the budget on the search part."""
        last, layers = len(self.points) - 1, len(self.curves)
        if budget.max_drop is not None:
            steps = 1 + layers if layers > 1 else 3  # the originals, sensitivities and the check are evaluations too
            allowed = float(budget.max_drop)
            at = self._bisect(0, last, lambda i: self.drop(i) <= allowed, steps)
            at = self._between(at, allowed) if self.calibrated and at < last else at
            return at, self.fits(at, budget)
        at = 0
        if budget.max_bytes is not None:
            limit = budget.max_bytes
            # the header of the file differs from the original's, so start a little above
            near = limit + LEAST_STEP // 2
            at = next((i for i in range(last + 1) if self.points[i].predicted_bytes <= near), last)
            while at < last and self.size_at(at) > limit:
                at += 1
            at = self._within_file(at, limit) if self.calibrated else at
            last = len(self.points) - 1
        if budget.max_latency is not None:
            slow = self._bisect(-1, last, lambda i: i < 0 or self.timed(i) > float(budget.max_latency or 0), 8)
            at = max(at, min(slow + 1, last))
        return at, self.fits(at, budget)

    @property
    def spare(self) -> int:
        """Evaluations that are left before the check."""
        return most_evaluations(len(self.curves)) - self.evaluations - 3

    def _between(self, at: int, allowed: float) -> int:
        """Between a point that holds and the next, which does not: smaller networks that hold, their bytes halved in logarithm."""
        high, low = self.stored(self.final_at(at)), self.stored(self.points[at + 1].plan)
        for _ in range(min(REFINEMENTS, self.spare)):
            middle = math.isqrt(low * high)
            found = self.within(middle, 1)
            if found is None or self.stored(found[0]) >= high:
                low = middle
                continue
            place = self._insert(*found)
            if self.drop(place) <= allowed:
                at, high = place, self.stored(found[0])
            else:
                low = middle
        return at

    def _within_file(self, at: int, limit: int) -> int:
        """A better plan of a point's size or a little more: what the file may take beyond the point's goes to its layers."""
        point = self.measured(at)
        if point.bytes > limit or self.spare < 2:
            return at
        found = self.within(
            self.stored(self.final_at(at)) + limit - point.bytes,
            min(REFINEMENTS + 1, self.spare),
            self.spare > 8 + LIKELY * self.wide,
        )
        better = found is not None and found[1].bytes <= limit and self.better(found[1], point)
        return self._insert(*found) if found is not None and better else at

    def _insert(self, plan: Plan, measured: Evaluation) -> int:
        """A measured plan as a point of the path; its place, by size."""
        sizes = {name: self.curves[name][0].bytes for name in self.curves}
        rest = self.points[0].predicted_bytes - sum(sizes.values())
        size = rest + self.stored(plan)
        place = next((i for i, point in enumerate(self.points) if point.predicted_bytes < size), len(self.points))
        near = self.points[min(place, len(self.points) - 1)]
        self.points.insert(place, Point(place, plan, size, near.predicted_damage, measured))
        return place

    def step_back(self, at: int, times: int) -> int:
        """A point towards the original with at most a quarter of the predicted damage, a 16th the second time, and so on."""
        less = self.points[at].predicted_damage / 4**times
        return max((i for i in range(at) if self.points[i].predicted_damage <= less), default=0)
