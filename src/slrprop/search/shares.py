"""How layers share bytes: the candidates of each, what an error of it does to the network, and the best plan of a size."""

import itertools
import math
from dataclasses import replace
from typing import Any

from torch import nn

from slrprop.api import finished
from slrprop.errors import SlrpropError
from slrprop.memory import bound
from slrprop.methods import Problem, find_method
from slrprop.methods.base import WIDEST
from slrprop.parallel import each
from slrprop.plan import LayerPlan, Plan
from slrprop.progress import Progress
from slrprop.search.observed import Observed, observed
from slrprop.search.path import (
    MANY_LAYERS,
    SPARSELY,
    TOLERANCE,
    Candidate,
    Choice,
    Evaluation,
    best_places,
    candidates_of,
    fitted,
    group_of,
    hull,
    kind_of,
    layer_inputs,
    neighbours,
    undominated,
)
from slrprop.search.times import Times
from slrprop.search.trials import Trials
from slrprop.selection import treated
from slrprop.tune import TuneSettings, distilled

MOST_AROUND = 4096  # bytes of a file around a layer's numbers; what grows by more still holds the dense weight
BADLY = 3  # times that predictions of methods may be off, compared with each other
LIKELY = 2  # of the methods that are tried alone on wide or many layers, how many are fitted in order


class Shares:
    """The layers' candidates, and the plans that they make.

    Args:
        methods: methods and settings that candidates are made by.
        narrow: more of them for layers of at most ``WIDEST`` neurons on a side, being slow on others.
        tuning: tune every plan that is measured; None does not.
        workers: processes, and ``cluster`` a Ray cluster, that share the layers' candidates (:func:`slrprop.parallel.each`).
        tolerance: how well candidates that are not fitted are foretold, see :class:`slrprop.search.path.Maker`; below 0 all are fitted.
        block: of ranks, see :func:`slrprop.search.blocks.in_blocks`.
        in_file: whether bytes are those of the file, names and shapes of the arrays included, or of the numbers alone.
    """

    def __init__(
        self,
        trials: Trials,
        problem: Problem,
        methods: tuple[Choice, ...],
        tuning: TuneSettings | None = None,
        workers: int = 1,
        cluster: str | None = None,
        narrow: tuple[Choice, ...] = (),
        in_file: bool = False,
        block: int = 1,
        tolerance: float = TOLERANCE,
    ) -> None:
        self.trials, self.problem, self.tuning = trials, problem, tuning
        self.methods, self.narrow = methods, narrow
        self.workers, self.cluster = workers, cluster
        self.in_file, self.block, self.tolerance = in_file, block, tolerance
        self._headers: dict[tuple[str, ...], list[tuple[LayerPlan, int]]] = {}
        all_methods = methods + narrow
        self.calibrated = any("inputs" in find_method(name).settings(**given).needs() for name, given in all_methods)
        self.sequential = all(settings.get("sequential", True) for _, settings in all_methods)
        self._finals: dict[str, Plan] = {}  # the last ones that fit
        self._carried_out: set[str] = set()  # what they are, as JSON
        self._in_order: dict[tuple[Any, ...], LayerPlan] = {}  # the last ones that fit, those fitted each by itself too
        self.curves: dict[str, list[Candidate]] = {}
        self.sensitivity: dict[str, float] = {}
        self.left_dense: dict[str, str] = {}

    def explore(self, layers: str | list[str] | None, most: float = math.inf) -> None:
        """Make the candidates of every layer (up to ``most`` bytes each) and measure what their errors do."""
        names, left_dense = treated(self.problem.network, "dense", find_method("dense").settings(bits=8), layers)
        if self.calibrated:
            self.problem.calibration.prepare(
                tuple(name for name in names if not self.problem.network.operator(name).bits_only)
            )
        inputs = layer_inputs(self.problem, names)
        every = SPARSELY if len(names) > MANY_LAYERS else 1
        narrow = {name for name in names if max(self.problem.network.shape(name)) <= WIDEST}
        methods = {name: self.methods + (self.narrow if name in narrow else ()) for name in names}
        shared = self.problem, inputs, methods, most, every, self.block, self.tolerance
        made = each(candidates_of, names, shared, self.workers, self.cluster)
        found = dict(Progress(made, total=len(names), desc="candidates", unit="layer"))
        del inputs, shared
        self.problem.calibration.forget()
        self.left_dense = left_dense | {name: "no form of it is smaller" for name in names if len(found[name]) < 2}
        self.curves = {name: self._in_file(name, found[name]) for name in names}
        hulls = {name: hull([c for c in found if not c.formless]) for name, found in self.curves.items()}
        self.sensitivity = sensitivity = dict.fromkeys(self.curves, 1.0)
        noise, chains = self.trials.judge.noise, self.problem.network.chain
        for name in Progress(self.curves, desc="sensitivities", unit="layer"):
            middle, moved = hulls[name][len(hulls[name]) // 2], 0.0
            if len(self.curves) > 1 and middle.layer is not None and middle.error > 0:
                moved = self._alone(middle)
                sensitivity[name] = max(moved, 1e-12) / middle.error
            if moved < noise and chains(name) is None and self._alone(hulls[name][-1]) < noise:
                self.leave_dense(name, "what it does shows in no output that is judged")
        if math.isinf(most) and all(len(curve) < 2 for curve in self.curves.values()):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.left_dense.items())
            raise SlrpropError(f"no layer can be made smaller ({reasons})")

    def _in_file(self, name: str, curve: list[Candidate]) -> list[Candidate]:
        """A layer's candidates with their bytes in the file; what those without a form have around them is that of others of their kind."""
        around = dict[Any, int]()
        for c in sorted(curve, key=lambda c: (c.formless, -c.bytes)):
            kind = c.layer and kind_of(c.layer)
            around[id(c)] = around[kind] if c.formless else self._around(name, c.layer, c.bytes)
            around[kind] = around[id(c)]
        return [replace(c, bytes=c.bytes + around[id(c)]) for c in curve]

    def time(self, times: Times) -> None:
        """Measure what the candidates take in time; a layer with no faster one stays as it is."""
        for name, curve in self.curves.items():
            self.curves[name] = times.of(name, curve) if len(curve) > 1 else curve
            if len(curve) > 1 and all(math.isnan(candidate.seconds) for candidate in self.curves[name][1:]):
                self.leave_dense(name, "no form of it runs faster")

    def _alone(self, candidate: Candidate) -> float:
        """The divergence of the network that has this form of one layer; infinite for the layer itself."""
        return math.inf if candidate.layer is None else self.trials.evaluate(Plan((candidate.layer,))).divergence

    def leave_dense(self, name: str, why: str) -> None:
        """Take a layer's candidates away."""
        self.curves[name] = self.curves[name][:1]
        self.left_dense = self.left_dense | {name: why}

    def alone(self, plan: Plan) -> Plan:
        """A plan of candidates, those without a form fitted now, each by itself."""
        keys = {layer.name: ("alone", Plan((layer,)).to_json()) for layer in plan.layers if layer.fit is None}
        missing = tuple(layer for layer in plan.layers if layer.name in keys and keys[layer.name] not in self._in_order)
        made = {layer.name: layer for layer in fitted(self.problem, Plan(missing), False, {}).layers}
        now = {name: made.get(name) or self._in_order[key] for name, key in keys.items()}
        self._in_order |= {keys[name]: layer for name, layer in made.items()}
        self._forget()
        return replace(plan, layers=tuple(now.get(layer.name, layer) for layer in plan.layers))

    def _forget(self) -> None:
        """Let go of the oldest layers and plans, until the others fit into their part of the memory together."""
        while True:
            layers = itertools.chain(self._in_order.values(), *(plan.layers for plan in self._finals.values()))
            held = {id(layer): layer.bytes for layer in layers}
            oldest: dict[Any, Any] = self._in_order or self._finals
            if sum(held.values()) <= bound() // 4 or not oldest:
                return
            del oldest[next(iter(oldest))]

    def final(self, plan: Plan) -> Plan:
        """A plan of candidates as it is carried out: its calibrated layers fitted one after the other, then tuned if asked."""
        key = plan.to_json()
        if key in self._carried_out:
            return plan
        found = self._finals.get(key)
        if found is None:
            found = fitted(self.problem, plan, self.sequential, self._in_order)
            if self.tuning is not None and found.layers:
                found = distilled(self.problem.network, self.problem.data, found, self.tuning)
            self._carried_out.add(found.to_json())
            self._finals[key] = found
            self._forget()
        return found

    def within(self, limit: int, tries: int, every: bool = False) -> tuple[Plan, Evaluation] | None:
        """The best plan found whose layers' bytes are at most ``limit``; None where none is that small.

        From the choice of least predicted damage, one layer gives bytes to another as long as the measured divergence falls.

        Args:
            tries: evaluations at most.
            every: start from the best of that choice and of those of each method alone, which takes one evaluation more each
                (and ``LIKELY`` more where layers are wide or many).
        """
        best: tuple[Plan, Evaluation] | None = None
        steps, place, target = {}, {}, limit
        for group in self._starts(limit) if every else self._groups()[:1]:
            started = self._start(group, limit)
            if started is None:
                continue
            found, plan, most = started
            measured = self.trials.evaluate(plan)
            if best is None or self.trials.better(measured, best[1]):
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
                measured = self.trials.evaluate(plan)
                if self.trials.better(measured, best[1]):
                    place, best = other, (plan, measured)
        return best

    def _groups(self) -> list[dict[str, list[Candidate]]]:
        """All candidates that none beats, and those of each method and width of numbers alone: predictions compare them badly."""
        kinds = sorted({group_of(c.layer) for curve in self.curves.values() for c in curve if c.layer is not None})

        def group(*some: tuple[str, int, str]) -> dict[str, list[Candidate]]:
            curves = self.curves.items()
            return {
                name: undominated([c for c in curve if c.layer is None or group_of(c.layer) in some])
                for name, curve in curves
            }

        return [group(*kinds), *(map(group, kinds) if len(kinds) > 1 else ())]

    def _starts(self, limit: int) -> list[dict[str, list[Candidate]]]:
        """The groups to start from; where fitting all layers in order takes long, the ``LIKELY`` best without that."""
        groups = self._groups()
        if not self.slow or len(groups) <= LIKELY:
            return groups
        places = [(group, best_places(group, self.sensitivity, limit)) for group in groups]
        rated = [(self._damage(group, place), group, place) for group, place in places if place is not None]
        least = min((damage for damage, *_ in rated), default=0.0)
        near = [
            (group, self.alone(self._chosen(group, place))) for damage, group, place in rated if damage <= BADLY * least
        ]
        return [group for group, _ in sorted(near, key=lambda one: self.trials.evaluate(one[1]).divergence)[:LIKELY]]

    @property
    def many(self) -> bool:
        """Whether layers are so many that fitting all of them in order takes long."""
        return len(self.curves) > MANY_LAYERS

    @property
    def slow(self) -> bool:
        """Whether it takes long since layers are many, or so wide that a fit takes seconds."""
        return self.many or any(max(self.problem.network.shape(name)) > WIDEST for name in self.curves)

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
        """Bytes that the explored layers take under a plan."""
        planned = {layer.name: layer for layer in plan.layers}
        total = 0
        for name, curve in self.curves.items():
            layer = planned.get(name)
            if layer is None or layer.fit is None:
                total += curve[0].bytes
            else:
                size = self.problem.network.stored(name, layer.fit)
                total += size + self._around(name, layer, size)
        return total

    def _around(self, name: str, layer: LayerPlan | None, size: int) -> int:
        """Bytes that the file takes around a form's numbers more than around the dense weight.

        Two files of each kind are made to know, one with the first such layer and one with a second: what unpacking needs is written once.
        """
        if not self.in_file or layer is None or layer.fit is None:
            return 0
        arrays, file = layer.fit.arrays(), self.trials.size
        known = self._headers.setdefault((layer.fit.form.kind, str(layer.settings["bits"]), *arrays), [])
        # in a module's file each array's name holds the layer's, as the dense weight's did
        named = len(name) * (len(arrays) - 1) if isinstance(self.trials.door.model, nn.Module) else 0
        before = tuple(first for first, _ in known)
        if len(known) < 2 and name not in {first.name for first in before}:
            more = file(Plan((*before, layer))) - file(Plan(before)) + self.problem.network.stored(name) - size
            known.append((layer, min(max(0, more), MOST_AROUND) - named))
        return known[known[0][0].name != name][1] + named

    def _damage(self, steps: dict[str, list[Candidate]], place: dict[str, int]) -> float:
        return sum(self.sensitivity[name] * steps[name][at].error for name, at in place.items())

    def _chosen(self, steps: dict[str, list[Candidate]], place: dict[str, int]) -> Plan:
        """The candidates at these places as they are."""
        known = {name: layer for name, at in place.items() if (layer := steps[name][at].layer) is not None}
        return finished(self.problem.network, known, {})

    def _planned(self, steps: dict[str, list[Candidate]], place: dict[str, int]) -> Plan:
        return self.final(self._chosen(steps, place))

    def observed(self, plan: Plan) -> dict[str, Observed]:
        """What is known of every layer that has candidates, now that this plan was chosen."""
        chosen = {layer.name: layer for layer in plan.layers}
        found = {}
        for name, curve in self.curves.items():
            layers = [candidate.layer for candidate in curve if candidate.layer is not None]
            rank = max((layer.settings["rank"] for layer in layers if "solver" in layer.settings), default=0)
            found[name] = observed(self.problem, name, rank, self.sensitivity[name], chosen.get(name))
        return found
