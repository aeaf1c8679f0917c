"""Networks of plans, measured: each once, and kept."""

import hashlib
import math
from dataclasses import asdict
from functools import cached_property
from numbers import Real

from slrprop.errors import SlrpropError
from slrprop.metrics import Score
from slrprop.plan import Plan
from slrprop.search.check import errors
from slrprop.search.judge import Door, Judge, Log
from slrprop.search.path import Evaluation
from slrprop.search.result import parse_size


class Trials:
    """What was measured of plans as they are carried out, on one part of the data.

    Args:
        checked: samples of the check part, for which upper ends of intervals are foretold; None: those of the judge.
    """

    def __init__(self, door: Door, judge: Judge, log: Log, checked: int | None = None) -> None:
        self.door, self.judge, self.log, self.checked = door, judge, log, checked
        self._known: dict[str, Evaluation] = {}
        self._sizes: dict[str, int] = {}
        self.evaluations = 1  # the original's

    def _key(self, what: str, plan: Plan) -> str:
        what += " with integer products" * self.door.integer_products + f" as {self.door.name}"
        what += f" for {self.checked}" * bool(self.checked)
        content = f"{what} {self.judge.fingerprint} {self.judge.metric} {plan.to_json()}"
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def original(self) -> Score:
        """How the original does on the search part."""
        return self.judge.judged(self.door.realise(Plan(())), self.judge.original)

    def evaluate(self, plan: Plan) -> Evaluation:
        """Run a plan's network over the search part."""
        if not plan.layers:
            return Evaluation(self.original.value, 0.0, self.size(plan))
        key = plan.to_json()
        if key not in self._known:
            self._known[key] = self._measure(plan)
        return self._known[key]

    def _measure(self, plan: Plan) -> Evaluation:
        self.evaluations += 1

        def measure() -> dict[str, float]:
            # who knows what the user's measure does to it
            made = self.door.realise(plan, sharing=self.judge.own is None)
            outputs = self.judge.outputs(made)
            found = self.judge.judged(made, outputs)
            upper = self.judge.interval(self.original, found, errors(), self.checked)[1]
            return asdict(Evaluation(found.value, self.judge.divergence(outputs), self.door.size(made), upper))

        if self.judge.own is not None:  # nobody knows whether the user's measure is still the same
            return Evaluation(**measure())  # type: ignore[arg-type]
        return Evaluation(**self.log.get(self._key("quality", plan), measure))  # type: ignore[arg-type]

    def size(self, plan: Plan) -> int:
        """Bytes of a plan's network; it is not run for that."""
        key = plan.to_json()
        if key not in self._sizes:
            self._sizes[key] = self.door.size(self.door.realise(plan, sharing=True))
        return self._sizes[key]

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

    def better(self, one: Evaluation, other: Evaluation) -> bool:
        """Whether a measurement is better: by the metric where it differs by more than chance would, else by the divergence."""
        gain = (one.quality - other.quality) * (-1 if self.judge.lower_is_better else 1)
        told = self.judge.metric in ("accuracy", "agreement") and not self.judge.own
        chance = 100 / math.sqrt(self.judge.samples) if told else math.inf
        return gain > 0 if abs(gain) > chance else one.divergence < other.divergence
