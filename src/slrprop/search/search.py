"""The path of plans from the original to the smallest network, and the point on it that a budget asks for."""

import math
from collections.abc import Callable
from dataclasses import replace

from slrprop.plan import Plan
from slrprop.search.check import LOOKS, Check, Look
from slrprop.search.path import BYTES, Cost, Evaluation, Point, path_of
from slrprop.search.result import Budget, most_evaluations
from slrprop.search.shares import LIKELY, Shares

STEPS = 5  # on the path at least; more come nearer to the edge, where the promise fails on fresh data
REFINEMENTS = 3  # evaluations beyond those on the path
GRAINS = 64  # parts of the path that are told apart where every look at it takes long


class Search:
    """The path of plans and what is known of it.

    Args:
        shares: explored; the path is made of its candidates.
        confident: the upper end of a drop's interval counts.
        cost: what the path saves at each step.
    """

    def __init__(self, shares: Shares, confident: bool = False, cost: Cost = BYTES) -> None:
        self.shares, self.trials, self.confident, self.cost = shares, shares.trials, confident, cost
        network, names = self.shares.problem.network, tuple(self.shares.curves)
        rest = self.trials.size(Plan(())) - sum(curve[0].bytes for curve in self.shares.curves.values())
        junctions = network.junctions(names)
        self.points = path_of(self.shares.curves, self.shares.sensitivity, junctions, rest, self.cost)

    def timed(self, at: int) -> float:
        """The point's latency, measured if it is missing."""
        self.points[at] = replace(self.points[at], latency=self.trials.latency(self.final_at(at)))
        return self.points[at].latency

    def measured(self, at: int) -> Evaluation:
        """The point's evaluation on the choosing part, made if it is missing."""
        found = self.points[at].measured or self.trials.evaluate(self.final_at(at))
        self.points[at] = replace(self.points[at], measured=found)
        return found

    def size_at(self, at: int) -> int:
        """Bytes of the point's network; it is not run for that."""
        known = self.points[at].measured
        return known.bytes if known is not None else self.trials.size(self.final_at(at))

    def final_at(self, at: int) -> Plan:
        """The point's plan as it is carried out."""
        self.points[at] = replace(self.points[at], plan=self.shares.final(self.points[at].plan))
        return self.points[at].plan

    def drop(self, at: int) -> float:
        """How much worse than the original a point is on the choosing part; where asked, the upper end of that, as it would be on the check part."""
        return self._drop(self.measured(at)) if self.points[at].plan.layers else 0.0

    def _drop(self, measured: Evaluation) -> float:
        if self.confident:
            return measured.upper
        change = self.measured(0).quality - measured.quality
        return -change if self.trials.judge.lower_is_better else change

    def fits(self, at: int, budget: Budget) -> bool:
        """Whether a point is small and fast enough."""
        small = budget.max_bytes is None or self.measured(at).bytes <= budget.max_bytes
        return small and (budget.max_latency is None or self.timed(at) <= budget.max_latency)

    def _bisect(self, low: int, high: int, holds: Callable[[int], bool], steps: int, grain: int = 1) -> int:
        """The last index from ``low`` (holds) to ``high`` for which ``holds``, as far as ``steps`` trials can tell; less than ``grain`` before it is near enough."""
        while high - low >= grain and steps:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if holds(middle) else (low, middle - 1)
            steps -= 1
        return low

    def choose(self, budget: Budget) -> tuple[int, bool]:
        """The point to promise, and whether it is in the budget on the choosing part."""
        last = len(self.points) - 1
        if budget.max_drop is not None:
            allowed = float(budget.max_drop)
            at = self._edge(allowed)
            at = self._between(at, allowed) if at < last and budget.max_latency is None else at
            return at, self.fits(at, budget)
        at = 0
        if budget.max_bytes is not None:
            limit = budget.max_bytes
            at = next((i for i in range(last + 1) if self.points[i].predicted_bytes <= limit), last)
            while at < last and self.size_at(at) > limit:
                at += 1
            at = self._within_file(at, limit) if budget.max_latency is None else at
            last = len(self.points) - 1
        if budget.max_latency is not None:
            slow = self._bisect(
                -1,
                last,
                lambda i: i < 0 or self.timed(i) > float(budget.max_latency or 0),
                len(self.points).bit_length(),
            )
            at = max(at, min(slow + 1, last))
        return at, self.fits(at, budget)

    def _edge(self, allowed: float) -> int:
        """The last point that holds. Where many layers are to be fitted in order, sought around the last one that holds with every layer fitted for itself."""
        last, steps = len(self.points) - 1, max(STEPS, 1 + len(self.shares.curves))

        def holds(at: int) -> bool:
            return self.drop(at) <= allowed

        def holds_alone(at: int) -> bool:
            return at == 0 or self._drop(self.trials.evaluate(self.shares.alone(self.points[at].plan))) <= allowed

        if not self.shares.many:
            return self._bisect(0, last, holds, steps)
        low, grain = self._bisect(0, last, holds_alone, steps), 1 + last // GRAINS
        high, width = low, grain
        while high < last and holds(high):
            low, high, width = high, min(high + width, last), 2 * width
        while not holds(low):
            low, high, width = max(low - width, 0), low - 1, 2 * width
        return self._bisect(low, high, holds, steps, grain)

    @property
    def spare(self) -> int:
        """Evaluations that are left before the check."""
        return most_evaluations(len(self.shares.curves)) - self.trials.evaluations - 3

    def _between(self, at: int, allowed: float) -> int:
        """Between a point that holds and the next, which does not: smaller networks that hold, their bytes halved in logarithm.

        Where layers are many the next is near enough.
        """
        high = self.shares.stored(self.final_at(at))
        low = self.points[at + 1].predicted_bytes - self.points[0].predicted_bytes + self.shares.stored(Plan(()))
        for _ in range(0 if self.shares.many else min(REFINEMENTS, self.spare)):
            middle = math.isqrt(low * high)
            found = self.shares.within(middle, 1)
            if found is None or self.shares.stored(found[0]) >= high:
                low = middle
                continue
            place = self._insert(*found)
            if self.drop(place) <= allowed:
                at, high = place, self.shares.stored(found[0])
            else:
                low, at = middle, at + (place <= at)  # the point that holds may have moved
        return at

    def _within_file(self, at: int, limit: int) -> int:
        """A better plan of a point's size or a little more: what the file may take beyond the point's goes to its layers."""
        point, found = self.measured(at), None
        target = self.shares.stored(self.final_at(at)) + limit - point.bytes
        while point.bytes <= limit and self.spare >= 2:
            every = self.spare > 8 + LIKELY * self.shares.slow
            tries = 1 if self.shares.many else REFINEMENTS + 1
            found = self.shares.within(target, min(tries, self.spare), every)
            if found is None or found[1].bytes <= limit:
                break
            target -= found[1].bytes - limit  # the file takes more around them than was predicted
        better = found is not None and found[1].bytes <= limit and self.trials.better(found[1], point)
        return self._insert(*found) if found is not None and better else at

    def _insert(self, plan: Plan, measured: Evaluation) -> int:
        """A measured plan as a point of the path; its place, by size."""
        rest = self.points[0].predicted_bytes - sum(curve[0].bytes for curve in self.shares.curves.values())
        size = rest + self.shares.stored(plan)
        place = next((i for i, point in enumerate(self.points) if point.predicted_bytes < size), len(self.points))
        damage = self.points[min(place, len(self.points) - 1)].predicted_damage
        self.points.insert(place, Point(plan, size, damage, measured))
        return place

    def step_back(self, at: int, times: int) -> int:
        """A point towards the original with at most half of this one's predicted damage, a quarter the second time, and so on."""
        less = self.points[at].predicted_damage / 2**times
        return max((i for i in range(at) if self.points[i].predicted_damage <= less), default=0)

    def promised(self, at: int, budget: Budget, check: Check, original: int) -> tuple[int, bool, Look]:
        """The first of a point and those behind it that holds on the check part, whether it is small and fast enough, and the look at it.

        Where none does, or its file is larger than the original's, that is the original, which is always within a drop.
        """

        def looked(at: int) -> tuple[int, bool, Look]:
            at = 0 if self.size_at(at) > original else at
            return at, self.fits(at, budget), check.look(self.final_at(at))

        at, feasible, look = looked(at)
        while feasible and not look.within and check.looks < min(LOOKS, self.spare + 2):
            at, feasible, look = looked(self.step_back(at, check.looks))
        if not look.within and self.fits(0, budget):
            at, feasible, look = looked(0)
        measured = {i: point.measured.upper for i, point in enumerate(self.points) if i and point.measured}
        if self.confident and not check.looks and measured:
            plan = self.final_at(min(measured, key=lambda i: measured[i]))
            made = self.trials.door.realise(plan)
            check.need(self.trials.original, self.trials.judge.judged(made, self.trials.judge.outputs(made)))
        return at, feasible, look
