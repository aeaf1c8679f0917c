"""What a user allows, and what was found."""

import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from slrprop.errors import SlrpropError, finite
from slrprop.metrics import PERCENT
from slrprop.plan import Plan, method_of, wording
from slrprop.search.observed import Observed
from slrprop.search.path import Candidate, Point


@dataclass(frozen=True)
class Budget:
    """What the user allows: points of the metric, bytes of the file, seconds of one sample on one thread."""

    max_drop: float | None = None
    max_bytes: int | None = None
    max_latency: float | None = None
    change: str = "drop"  # or "growth", of a metric of which less is better

    def __str__(self) -> str:
        parts = [
            "" if self.max_drop is None else f"a {self.change} of at most {self.max_drop:g}",
            "" if self.max_bytes is None else f"at most {self.max_bytes:,} bytes",
            "" if self.max_latency is None else f"at most {1e3 * self.max_latency:.3g} ms",
        ]
        return ", ".join(part for part in parts if part)


def most_evaluations(layers: int) -> int:
    """Runs of a whole network that a search may take."""
    return 4 + 2 * max(8, layers)


def parse_size(given: int | float | str, original: float, what: str) -> int:
    """A number, ``"300KB"``, ``"1.5MB"`` or ``"25%"`` of the original, in whole units."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*(%|[kKmMgG]?[bB]?)\s*", str(given))
    try:
        value = float(found.group(1)) if found else math.nan
    except ValueError:
        value = math.nan
    unit = found.group(2).lower().rstrip("b") if found else ""
    total = value * (original / 100 if unit == "%" else {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[unit])
    if not 1 <= total < math.inf:
        raise SlrpropError(f"{what} must be a positive number, like 300000, '300KB' or '25%', got {str(given)[:40]!r}")
    return int(total)


class BudgetError(SlrpropError):
    """The budget can't be met; ``best`` is the nearest compression that was found, None where no search was begun."""

    def __init__(self, message: str, best: "Compression | None" = None) -> None:
        super().__init__(message)
        self.best = best


@dataclass(frozen=True)
class Compression:
    """What :func:`compress` found, and how it knows.

    ``quality`` (before, after), ``drop`` and its 95 % ``interval`` are of the check part of the data; ``points`` are the
    plans on the way from the original (first) to the smallest, ``chosen`` the index of this one; ``curves`` are all
    candidates of each layer. ``latency`` is in seconds, NaN where it was no goal. ``evaluations`` counts runs of a
    whole network over a part of the data, ``samples`` those of the choosing and the check part; ``looks`` says how often the
    check part was looked at, which the interval allows for, ``needed`` about how many samples of it would bring the interval's end into
    the budget (None: unknown or no number). ``learnt``: the original is right on so many of them that it was probably trained on them. ``observed`` says more of
    each layer that has candidates, ``left_dense`` why others have none; ``settings`` are the arguments of the call.
    ``reason`` says why the metric was taken where none was asked for, ``change`` whether it is a drop or a growth that is for the
    worse; ``beside`` has metrics that show what the chosen one may hide (before, after), ``notes`` what is odd about the data.
    """

    model: Any
    plan: Plan
    budget: Budget
    met: bool
    metric: str
    quality: tuple[float, float]
    drop: float
    interval: tuple[float, float]
    bytes: tuple[int, int]
    latency: tuple[float, float]
    evaluations: int
    points: tuple[Point, ...]
    chosen: int
    curves: dict[str, list[Candidate]]
    seed: int
    data_fingerprint: str
    seconds: float
    samples: tuple[int, int] = (0, 0)
    observed: dict[str, Observed] = field(default_factory=dict)
    left_dense: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    looks: int = 1
    needed: int | None = None
    learnt: bool = False
    reason: str = ""
    change: str = "drop"
    beside: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        before, after = self.bytes
        lines = [
            f"bytes: {before:,} -> {after:,} ({before / after:.1f}x smaller)",
            f"{self.metric}: {self.number(self.quality[0])} -> {self.number(self.quality[1])}, "
            f"a {self.change} of {self.number(self.drop)}{self.between()}"
            + ("" if math.isnan(self.interval[0]) or not self.plan.layers else f", {self.basis()}"),
            *(f"{name}: {before:.2f} -> {after:.2f}" for name, (before, after) in self.beside.items()),
            *self.remarks(),
        ]
        if not math.isnan(self.latency[1]):
            lines.append(
                f"latency: {1e3 * self.latency[0]:.3f} -> {1e3 * self.latency[1]:.3f} ms (ONNX Runtime, one sample, one thread)"
            )
        lines.append(f"evaluations: {self.evaluations}, {self.seconds:.1f} s")
        return "\n".join(lines)

    def reasons(self) -> list[str]:
        """Why each layer has its form: what the best other method of at most as many bytes is predicted to cost."""
        found = [f"{name} stays as it is: {why}" for name, why in self.left_dense.items()]
        for layer in self.plan.layers:
            curve = self.curves.get(layer.name, [])
            mine = next((c for c in curve if c.layer is not None and wording(c.layer) == wording(layer)), None)
            if mine is None:
                found.append(f"{layer.name}: refitted to the new inputs")
                continue
            forms = [c for c in curve if c.layer is not None and c.bytes <= mine.bytes]
            others = [c for c in forms if c.layer is not None and method_of(c.layer) != method_of(layer)]
            best = min(others, key=lambda c: c.error, default=None)
            if best is None or best.layer is None:
                found.append(f"{layer.name}: {wording(layer)}, no other method is that small")
                continue
            times = best.error / mine.error if mine.error > 0 else math.inf
            found.append(
                f"{layer.name}: {wording(layer)}; of {len(forms)} forms of at most {mine.bytes:,} bytes in the file the best of another "
                f"method is {wording(best.layer)}, predicted to do {times:.2g} times the damage"
            )
        return found

    def basis(self) -> str:
        """What the interval speaks of."""
        again = "" if self.looks < 2 else f", looked at {self.looks} times, which it allows for"
        return f"for samples like the {self.samples[1]:,} that the search did not see{again}; other data may lose more"

    def remarks(self) -> list[str]:
        """What a user should know before the promise is relied on."""
        found = [f"metric: {self.metric}, since {self.reason}"] if self.reason else []
        found += [f"note: {note}" for note in self.notes]
        if self.learnt:
            found.append(
                f"note: the original is right on {self.quality[0]:.2f} % of the samples checked, so it was probably trained on them; "
                "what is lost on fresh ones may be more: give samples that it has not seen (--check takes them apart)"
            )
        if not self.plan.layers:
            why = "the original is" if self.budget.max_drop is None else "nothing smaller that was tried is"
            found.append(f"note: every layer stays as it is: {why} within the budget, this is a copy{self.enough()}")
        elif self.budget.max_drop is not None and self.interval[1] > self.budget.max_drop:
            limit = f"{self.budget.max_drop:g}{self.enough()}"
            found.append(
                f"note: the interval reaches beyond {limit}; confident (--confident) asks for its upper end too"
            )
        lost, most = {name: before - after for name, (before, after) in self.beside.items()}, self.budget.max_drop
        if most is not None and lost and max(lost.values()) > most:
            name = max(lost, key=lambda name: lost[name])
            found.append(
                f"note: {name} fell by {lost[name]:.2f}, {self.metric} by {self.number(self.drop)}: rare classes lost more; "
                "metric balanced_accuracy (--metric) weighs all classes alike"
            )
        return found

    def enough(self) -> str:
        """How many samples would bring the interval's end into the budget; nothing where that is not known, or no more."""
        many = self.needed is not None and self.needed > self.samples[1]
        return f" (about {self.needed:,} samples to check on might do, here are {self.samples[1]:,})" if many else ""

    def between(self) -> str:
        """The interval in words; nothing where none is known."""
        low, high = self.interval
        return "" if math.isnan(low) else f", 95 % interval {self.number(low)} to {self.number(high)}"

    def number(self, value: float) -> str:
        """A value of the metric."""
        return f"{value:.2f}" if self.metric in PERCENT else f"{value:.4g}"

    def summary(self) -> dict[str, Any]:
        """The facts as JSON; what is not known is null."""
        names = (
            "met", "metric", "quality", "drop", "change", "reason", "beside", "notes", "interval", "looks", "needed", "samples",
            "bytes", "latency", "evaluations", "seed", "data_fingerprint", "seconds",
        )  # fmt: skip
        facts = {name: getattr(self, name) for name in names}
        found: dict[str, Any] = finite(facts)
        return found | {"budget": asdict(self.budget), "plan": json.loads(self.plan.to_json())}
