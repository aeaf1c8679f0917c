"""The check part of the data: nothing is chosen by it, and every further look at it is paid for by a wider interval."""

from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

from slrprop.metrics import Score
from slrprop.plan import Plan
from slrprop.search.judge import Door, Judge
from slrprop.search.result import Budget

RISK = 0.05  # that the interval of what is returned does not hold the truth
SPENT = 0.8  # by each look, of the risk that those before it left
LOOKS = 4
MOST_SAMPLES = 10**8


def errors(look: int = 1, only: bool = False) -> float:
    """Standard errors on each side of the interval of a look, counted from 1.

    The looks' risks add up to 5 % at most, so that the interval which is kept covers in 95 of 100 searches, whichever look it is of.

    Args:
        only: no other look can follow, and this one takes all of it.
    """
    risk = RISK if only else RISK * SPENT * (1 - SPENT) ** (look - 1)
    return NormalDist().inv_cdf(1 - risk / 2)


def samples_for(limit: float, upper: Callable[[int], float]) -> int | None:
    """About how many samples bring the upper end of an interval down to ``limit``, to two digits; None: no number does."""
    count = 10.0
    while upper(int(count)) > limit:
        count *= 1.05
        if count > MOST_SAMPLES:
            return None
    return int(float(f"{count:.1e}"))


class Look(NamedTuple):
    """A network on the check part: its quality, how much worse than the original it is, the interval of that; see :meth:`Judge.beside`."""

    made: Any
    quality: float
    drop: float
    interval: tuple[float, float]
    within: bool
    beside: dict[str, tuple[float, float]]


class Check:
    """Looks at the check part.

    ``needed`` is about how many samples are enough for the upper end of a first look's interval at what was looked at last;
    None where that is not known, or no number is.
    """

    def __init__(self, judge: Judge, door: Door, budget: Budget, confident: bool) -> None:
        self.judge, self.door, self.budget, self.confident = judge, door, budget, confident
        self.before = judge.judged(door.realise(Plan(())), judge.original)
        self.looks = 0
        self.needed: int | None = None

    def original(self) -> Look:
        """The original, of which everything is known."""
        beside = self.judge.beside(self.judge.original)
        return Look(self.door.realise(Plan(())), self.before.value, 0.0, (0.0, 0.0), True, beside)

    def look(self, plan: Plan) -> Look:
        """Run a plan's network over the check part."""
        if not plan.layers:
            return self.original()
        self.looks += 1
        limit, made = self.budget.max_drop, self.door.realise(plan)
        outputs, wide = self.judge.outputs(made), errors(self.looks, only=limit is None)
        after = self.judge.judged(made, outputs)
        drop = (self.before.value - after.value) * (-1 if self.judge.lower_is_better else 1)
        interval = self.judge.interval(self.before, after, wide)
        within = limit is None or (interval[1] if self.confident else drop) <= limit
        self.need(self.before, after)
        return Look(made, after.value, drop, interval, within, self.judge.beside(outputs))

    def need(self, before: Score, after: Score) -> None:
        """Find how many samples to check on would be enough for a network with this score on some part of the data."""
        limit = self.budget.max_drop
        if limit is not None and after.influence is not None:
            self.needed = samples_for(limit, lambda count: self.judge.interval(before, after, errors(), count)[1])
