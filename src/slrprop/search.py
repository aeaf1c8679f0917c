"""Which layer gets which method and rank under a budget: few real evaluations, then a promise checked on other data.

1. Every layer's candidates (method, rank) get a predicted damage: the relative error of the layer's output on calibration
   inputs, times the layer's sensitivity (the divergence of the network's output from the original per unit of that
   error, measured once per layer with only that layer compressed).
2. The candidates on the convex hull of (bytes, damage) form one path from the original to the smallest network:
   at each step the layer that saves the most bytes per damage moves on.
3. Bisection along the path with real evaluations on the search part of the data finds the smallest network in the budget.
4. The result is measured on the check part, which nothing before has seen.
"""

import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from slrprop.api import feeds_between, plan_problem, realised
from slrprop.checks import require_choice
from slrprop.data import Batch, Data, open_data
from slrprop.errors import SlrpropError
from slrprop.export import export_onnx
from slrprop.latency import latencies
from slrprop.layers import linear_from
from slrprop.losses import LossName, check_labels, loss_point, rows_of
from slrprop.methods import Problem
from slrprop.network import OnnxNetwork, open_network
from slrprop.observed import Observed, observed
from slrprop.plan import LayerPlan, Plan
from slrprop.storage import to_bytes

DEFAULT_METHODS: dict[str, dict[str, Any]] = {"svd": {}, "slr": {"criterion": "weight"}}
CALIBRATION_ROWS = 512  # inputs of each layer that predictions are made from
WIDE_RANKS = 256  # highest rank tried on layers with more than 2048 neurons on both sides


@dataclass(frozen=True)
class Candidate:
    """One layer under one method and rank; ``layer`` None leaves it dense. ``error`` is relative, squared."""

    bytes: int
    error: float
    layer: LayerPlan | None = None


@dataclass(frozen=True)
class Evaluation:
    """A network, measured on the search part: ``quality`` in the metric's unit, ``divergence`` from the original."""

    quality: float
    divergence: float
    bytes: int
    latency: float = math.nan


@dataclass(frozen=True)
class Point:
    """A plan on the path, and what was measured of it; ``latency`` in seconds, NaN where it was not timed."""

    step: int
    plan: Plan
    predicted_bytes: int
    predicted_damage: float
    measured: Evaluation | None = None
    latency: float = math.nan


def ranks_for(m: int, n: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ...: up to the break-even rank of an m x n layer."""
    limit = (m * n - 1) // (m + n)
    if min(m, n) > 2048:
        limit = min(limit, WIDE_RANKS)
    powers = (2**power for power in range(limit.bit_length()))
    return sorted({rank for power in powers for rank in (power, power + power // 2) if 1 <= rank <= limit})


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


def path_of(
    hulls: Mapping[str, list[Candidate]], sensitivity: Mapping[str, float], feeds: dict[str, str], rest: int
) -> list[Point]:
    """Plans from the original to the smallest, one layer moving one step along its hull at a time.

    Args:
        rest: bytes of everything but these layers' weights.
    """
    place = dict.fromkeys(hulls, 0)

    def point(step: int) -> Point:
        chosen = {name: hulls[name][at] for name, at in place.items()}
        layers = tuple(candidate.layer for candidate in chosen.values() if candidate.layer is not None)
        planned = {layer.name for layer in layers}
        near = {first: second for first, second in feeds.items() if first in planned or second in planned}
        damage = sum(sensitivity[name] * candidate.error for name, candidate in chosen.items())
        return Point(step, Plan(layers, {}, near), rest + sum(c.bytes for c in chosen.values()), damage)

    points = [point(0)]
    while True:
        moves = [
            (sensitivity[name] * _slope(hulls[name][at], hulls[name][at + 1]), name)
            for name, at in place.items()
            if at + 1 < len(hulls[name])
        ]
        if not moves:
            return points
        place[min(moves)[1]] += 1
        points.append(point(len(points)))


METRICS = ("accuracy", "agreement", "squared_error")


@dataclass(frozen=True)
class Budget:
    """What the user allows: points of the metric, bytes of the file, seconds of one sample on one thread."""

    max_drop: float | None = None
    max_bytes: int | None = None
    max_latency: float | None = None

    def __str__(self) -> str:
        parts = [
            "" if self.max_drop is None else f"a drop of at most {self.max_drop:g}",
            "" if self.max_bytes is None else f"at most {self.max_bytes:,} bytes",
            "" if self.max_latency is None else f"at most {1e3 * self.max_latency:.3g} ms",
        ]
        return ", ".join(part for part in parts if part)


class BudgetError(SlrpropError):
    """The budget can't be met; ``best`` is the nearest compression that was found."""

    def __init__(self, message: str, best: "Compression") -> None:
        super().__init__(message)
        self.best = best


@dataclass(frozen=True)
class Compression:
    """What :func:`compress` found, and how it knows.

    ``quality`` (before, after), ``drop`` and its 95 % ``interval`` are of the check part of the data; ``points`` are the
    plans on the way from the original (first) to the smallest, ``chosen`` the index of this one; ``curves`` are all
    candidates of each layer. ``latency`` is in seconds, NaN where it was no goal. ``evaluations`` counts runs of a
    whole network over a part of the data, ``samples`` those of the search and the check part. ``observed`` says more of
    each layer that has candidates, ``left_dense`` why others have none; ``settings`` are the arguments of the call.
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

    def __str__(self) -> str:
        before, after = self.bytes
        lines = [
            f"bytes: {before:,} -> {after:,} ({before / after:.1f}x smaller)",
            f"{self.metric}: {self.quality[0]:.2f} -> {self.quality[1]:.2f}, a drop of {self.drop:.2f} (95 % interval "
            f"{self.interval[0]:.2f} to {self.interval[1]:.2f}) on data the search did not see",
        ]
        if not math.isnan(self.latency[1]):
            lines.append(
                f"latency: {1e3 * self.latency[0]:.3f} -> {1e3 * self.latency[1]:.3f} ms (ONNX Runtime, one sample, one thread)"
            )
        lines.append(f"evaluations: {self.evaluations}, {self.seconds:.1f} s")
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """The facts as JSON; what is not known is null."""

        def known(value: Any) -> Any:
            if isinstance(value, tuple):
                return [known(part) for part in value]
            return None if isinstance(value, float) and math.isnan(value) else value

        names = (
            "met",
            "metric",
            "quality",
            "drop",
            "interval",
            "bytes",
            "latency",
            "evaluations",
            "seed",
            "data_fingerprint",
            "seconds",
        )
        facts = {name: known(getattr(self, name)) for name in names}
        return facts | {"budget": asdict(self.budget), "plan": json.loads(self.plan.to_json())}


def interval_of(differences: Tensor, binary: bool) -> tuple[float, float]:
    """95 % interval of the mean paired difference (p,), in the metric's unit.

    For percentages of right answers: Agresti and Min, Statistics in Medicine 24, 2005 (half an observation added to
    each cell), which does not collapse where both networks agree. Otherwise the normal interval.
    """
    n = len(differences)
    if not binary:
        mean, deviation = float(differences.mean()), float(differences.std()) if n > 1 else math.inf
        half = 1.96 * deviation / math.sqrt(n)
        return mean - half, mean + half
    lost, won = float((differences > 0).sum()), float((differences < 0).sum())
    mean = (lost - won) / (n + 2)
    half = 1.96 * math.sqrt(max(lost + won + 1 - (lost - won) ** 2 / (n + 2), 0.0)) / (n + 2)
    return 100 * (mean - half), 100 * (mean + half)


class _Judge:
    """Measures networks on one part of the data against the original's outputs there."""

    def __init__(self, model: Any, part: Data, metric: str | None, own: "Callable[[Any], float] | None" = None) -> None:
        self.own = own
        self.lower_is_better = False
        self.part = part
        self.network = open_network(model, part)
        digest, outputs, targets = hashlib.sha256(), [], []
        for flow in self.network.stream((), part):
            outputs.append(rows_of(self.network.scores(flow.output)))
            targets.append(flow.batch.targets)
            for tensor in (*flow.batch.inputs, *flow.batch.named.values(), flow.batch.targets, outputs[-1]):
                if isinstance(tensor, Tensor):
                    digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self.original = torch.cat(outputs)
        self.fingerprint = digest.hexdigest()
        labelled = all(target is not None for target in targets)
        self.targets = torch.cat([target for target in targets if target is not None]) if labelled else None
        self.metric = metric or self._usual()
        require_choice("metric", self.metric, METRICS)
        if self.metric == "accuracy" and self.targets is None:
            raise SlrpropError("metric 'accuracy' needs labels, and the data has none; use metric='agreement'")

    def _usual(self) -> str:
        if self.targets is not None:
            return "squared_error" if self.targets.is_floating_point() else "accuracy"
        return "agreement" if self.original.shape[1] > 1 else "squared_error"

    def qualities(self, outputs: Tensor) -> Tensor:
        """The metric of every sample (p,): 100 or 0 for right or wrong answers, else the squared error."""
        if self.metric == "squared_error":
            goal = self.original if self.targets is None else self.targets.reshape(len(outputs), -1).to(outputs)
            return (outputs - goal).square().sum(1).double()
        right = (
            check_labels(self.targets, outputs)
            if self.metric == "accuracy" and self.targets is not None
            else self.original.argmax(1)
        )
        return 100.0 * (outputs.argmax(1) == right).double()

    def drops(self, outputs: Tensor) -> Tensor:
        """How much worse than the original every sample is (p,)."""
        change = self.qualities(outputs) - self.qualities(self.original)
        return change if self.metric == "squared_error" else -change

    def divergence(self, outputs: Tensor) -> float:
        """Mean KL divergence from the original's outputs; mean squared distance where there are no classes."""
        loss: LossName = "squared" if self.metric == "squared_error" else "kl"
        return float(loss_point(loss, outputs, None, self.original).values.double().mean())

    def quality(self, model: Any, outputs: Tensor) -> float:
        """The metric of a network with these outputs."""
        if self.own is None:
            return float(self.qualities(outputs).mean())
        if isinstance(model, nn.Module):
            return float(self.own(model))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            model.save(path, lambda _: None)
            return float(self.own(path))

    def outputs(self, model: Any) -> Tensor:
        """The outputs (p x c) of another network on this part."""
        network = open_network(model, self.part)
        return torch.cat([rows_of(network.scores(flow.output)) for flow in network.stream((), self.part)])


class _Log:
    """What was measured, one JSON line each, on disk before it is used."""

    def __init__(self, folder: Path | None) -> None:
        self.known: dict[str, dict[str, float]] = {}
        self.path = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / "measured.jsonl"
            for line in self.path.read_text().splitlines() if self.path.exists() else []:
                try:
                    self.known |= json.loads(line)
                except ValueError:  # a line cut off by a kill
                    continue

    def get(self, key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The measurement of that key, made now if it is not known."""
        if key not in self.known:
            self.known[key] = measure()
            if self.path is not None:
                with open(self.path, "a") as file:
                    file.write("\n" + json.dumps({key: self.known[key]}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
        return self.known[key]


class _Door:
    """How plans become networks that can be measured: torch modules, or ONNX files in memory."""

    def __init__(self, model: Any, data: Data) -> None:
        self.model, self.first = model, next(iter(data))

    def realise(self, plan: Plan) -> Any:
        """The network of a plan, for :func:`slrprop.network.open_network`."""
        return realised(self.model, plan)

    def size(self, made: Any) -> int:
        """Bytes of the file of a network that :meth:`realise` gave."""
        if isinstance(made, nn.Module):
            return len(to_bytes(made))
        with tempfile.TemporaryDirectory() as folder:
            made.save(Path(folder) / "model.onnx", lambda _: None)
            return sum(path.stat().st_size for path in Path(folder).iterdir())

    def latencies(self, plans: Mapping[str, Plan], repetitions: int = 50) -> dict[str, float]:
        """Seconds for one sample in ONNX Runtime on one thread, all plans interleaved."""
        with tempfile.TemporaryDirectory() as folder:
            files = {}
            for index, (name, plan) in enumerate(plans.items()):
                files[name] = Path(folder) / f"{index}.onnx"
                made = self.realise(plan)
                if isinstance(made, nn.Module):
                    export_onnx(made, files[name], tuple(x[:4] for x in self.first.inputs))
                else:
                    made.save(files[name], lambda _: None)
            network = open_network(self.model, None)
            one = Batch(tuple(x[:1] for x in self.first.inputs), {k: v[:1] for k, v in self.first.named.items()}, None)
            feed: Any = network.feed(one) if isinstance(network, OnnxNetwork) else [x.numpy() for x in one.inputs]
            return latencies(files, feed, repetitions)


def compress(
    model: Any,
    data: Any,
    *,
    max_drop: float | None = None,
    max_bytes: int | str | None = None,
    max_latency_ms: float | None = None,
    max_latency: str | None = None,
    metric: str | None = None,
    evaluate: Callable[[Any], float] | None = None,
    lower_is_better: bool = False,
    methods: Mapping[str, dict[str, Any]] | None = None,
    layers: str | list[str] | None = None,
    confident: bool = False,
    seed: int = 0,
    run_dir: str | Path | None = None,
) -> Compression:
    """The smallest network within a budget, its promise checked on data that the search did not see.

    Args:
        model: a torch module or the path of an ONNX file; untouched.
        data: labelled or not; half of it is for the search, half for the check.
        max_drop: points of the metric (percent for ``accuracy`` and ``agreement``) that may be lost.
        max_bytes: size of the file, a number, ``"300KB"`` or ``"25%"`` of the original.
        max_latency_ms: milliseconds for one sample in ONNX Runtime on one thread.
        max_latency: the same as a share of the original's, ``"50%"``.
        metric: ``accuracy`` (labels), ``agreement`` with the original's answers, or ``squared_error``; found by default.
        evaluate: your own measure instead: takes a torch module or the path of an ONNX file, gives a number. It sees to
            its own data, so nothing is set apart for the check and no interval is known.
        lower_is_better: for ``evaluate``.
        methods: methods and their settings, ``{"svd": {}, "slr": {"criterion": "weight"}}`` by default.
        layers: names or patterns; None for all.
        confident: the upper end of the drop's interval must be within ``max_drop`` too.
        run_dir: measurements are kept here; the same call goes on where a killed one stopped.

    Raises:
        BudgetError: the budget can't be met; it carries the nearest compression found.
        SlrpropError: no budget, unusable data or model.
    """
    start = time.perf_counter()
    opened = open_data(data)
    search_part, check_part = opened.split(seed)
    door = _Door(model, search_part)
    judge = _Judge(model, search_part, metric, evaluate)
    judge.lower_is_better = lower_is_better if evaluate else judge.metric == "squared_error"
    problem = Problem(judge.network, search_part)
    empty = Plan(())
    log = _Log(None if run_dir is None else Path(run_dir))
    run = _Search(door, judge, problem, log, dict(methods or DEFAULT_METHODS), seed)
    original_bytes = door.size(door.realise(empty))
    budget = Budget(
        max_drop,
        None if max_bytes is None else parse_size(max_bytes, original_bytes, "max_bytes"),
        run.latency_limit(max_latency_ms, max_latency),
    )
    if not str(budget):
        raise SlrpropError("no budget was given; state max_drop, max_bytes or max_latency")
    run.explore(layers)
    at, feasible = run.choose(budget)
    check = _Judge(model, check_part, judge.metric, evaluate)
    before = check.quality(door.realise(empty), check.original)
    evaluations, tried = 0, set()
    while True:
        plan_now = run.points[at].plan
        made = door.realise(plan_now)
        outputs = check.outputs(made) if plan_now.layers else check.original
        evaluations += 1
        after = check.quality(made, outputs)
        drop = after - before if judge.lower_is_better else before - after
        interval = (
            (math.nan, math.nan) if evaluate else interval_of(check.drops(outputs), judge.metric != "squared_error")
        )
        within = budget.max_drop is None or (interval[1] if confident else drop) <= budget.max_drop
        tried.add(at)
        if within or not feasible or len(tried) > BACK_OFFS or at == 0:
            break
        at = run.step_back(at)  # the promise did not hold on fresh data: half the damage
        feasible = run.fits(at, budget)
    latency = (math.nan, math.nan) if budget.max_latency is None else (run.timed(0), run.timed(at))
    result = Compression(
        model=made, plan=plan_now, budget=budget, met=feasible and within, metric="evaluate" if evaluate else judge.metric,
        quality=(before, after), drop=drop, interval=interval, bytes=(original_bytes, door.size(made)), latency=latency,
        evaluations=run.evaluations + evaluations + 1, points=tuple(run.points), chosen=at, curves=run.curves, seed=seed,
        data_fingerprint=judge.fingerprint, seconds=time.perf_counter() - start,
        samples=(len(judge.original), len(check.original)), observed=run.observed(plan_now), left_dense=run.left_dense,
        settings={
            "model": type(model).__name__ if isinstance(model, nn.Module) else Path(model).name, "methods": run.methods,
            "layers": layers, "metric": metric, "confident": confident,
        },
    )  # fmt: skip
    if not result.met:
        raise BudgetError(
            f"no plan was found for {budget}; the nearest has a drop of {drop:.2f} ({judge.metric}, 95 % interval {interval[0]:.2f} to "
            f"{interval[1]:.2f}) at {result.bytes[1]:,} bytes; allow more, or give more methods or layers",
            result,
        )
    return result


BACK_OFFS = 2


def parse_size(given: int | float | str, original: float, what: str) -> int:
    """A number, ``"300KB"``, ``"1.5MB"`` or ``"25%"`` of the original, in whole units."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*(%|[kKmMgG]?[bB]?)\s*", str(given))
    try:
        value = float(found.group(1)) if found else math.nan
    except ValueError:
        value = math.nan
    if not value > 0 or found is None:
        raise SlrpropError(f"{what} must be a positive number, like 300000, '300KB' or '25%', got {given!r}")
    unit = found.group(2).lower().rstrip("b")
    return int(value / 100 * original) if unit == "%" else int(value * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[unit])


class _Search:
    """The path of plans and what is known of it."""

    def __init__(
        self, door: _Door, judge: _Judge, problem: Problem, log: _Log, methods: dict[str, dict[str, Any]], seed: int
    ) -> None:
        self.door, self.judge, self.problem, self.log = door, judge, problem, log
        self.methods, self.seed = methods, seed
        self.evaluations = 1  # the original's
        self.points: list[Point] = []
        self.curves: dict[str, list[Candidate]] = {}
        self.sensitivity: dict[str, float] = {}
        self.left_dense: dict[str, str] = {}

    def _key(self, what: str, plan: Plan) -> str:
        content = f"{what} {self.judge.fingerprint} {self.judge.metric} {plan.to_json()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def evaluate(self, plan: Plan) -> Evaluation:
        """Run a plan's network over the search part."""
        if not plan.layers:
            made = self.door.realise(plan)
            return Evaluation(self.judge.quality(made, self.judge.original), 0.0, self.door.size(made))
        self.evaluations += 1

        def measure() -> dict[str, float]:
            made = self.door.realise(plan)
            outputs = self.judge.outputs(made)
            quality, divergence = self.judge.quality(made, outputs), self.judge.divergence(outputs)
            return asdict(Evaluation(quality, divergence, self.door.size(made)))

        return Evaluation(**self.log.get(self._key("quality", plan), measure))  # type: ignore[arg-type]

    def latency(self, plan: Plan) -> float:
        """Seconds for one sample; measured beside the original's."""
        pair = {"original": Plan(()), "plan": plan}
        return self.log.get(self._key("latency", plan), lambda: self.door.latencies(pair))["plan"]

    def latency_limit(self, milliseconds: float | None, share: str | None) -> float | None:
        """The stricter of both, in seconds."""
        limits = []
        if milliseconds is not None:
            limits.append(parse_size(f"{float(milliseconds) * 1e6:.0f}", 0, "max_latency_ms") / 1e9)
        if share is not None:
            if not str(share).strip().endswith("%"):
                raise SlrpropError(
                    f"max_latency is a share of the original's, like '50%', got {share!r}; use max_latency_ms for milliseconds"
                )
            limits.append(parse_size(share, 1e9 * self.latency(Plan(())), "max_latency") / 1e9)
        return min(limits, default=None)

    def explore(self, layers: str | list[str] | None) -> None:
        """Candidates of every layer, their sensitivities, and the path they make."""
        network = self.problem.network
        probe = plan_problem(self.problem, "svd", layers, rank=1)
        names = tuple(layer.name for layer in probe.layers)
        if not names:
            raise SlrpropError(
                f"no layer can be made smaller ({'; '.join(f'{k}: {v}' for k, v in probe.left_dense.items())})"
            )
        inputs = layer_inputs(self.problem, names)
        for name in tqdm(names, desc="candidates", unit="layer", disable=None):
            self.curves[name] = candidates_of(self.problem, name, inputs[name], self.methods)
        hulls = {name: hull(found) for name, found in self.curves.items()}
        self.left_dense = probe.left_dense
        self.sensitivity = sensitivity = dict.fromkeys(names, 1.0)
        for name in tqdm(names if len(names) > 1 else (), desc="sensitivities", unit="layer", disable=None):
            middle = hulls[name][len(hulls[name]) // 2]
            if middle.layer is not None and middle.error > 0:
                alone = Plan((middle.layer,))
                sensitivity[name] = max(self.evaluate(alone).divergence, 1e-12) / middle.error
        weights = sum(network.weight(name).nbytes for name in names)
        feeds = feeds_between(network, names)
        rest = self.door.size(self.door.realise(Plan(()))) - weights
        self.points = path_of(hulls, sensitivity, feeds, rest)

    def observed(self, plan: Plan) -> dict[str, Observed]:
        """What is known of every layer that has candidates, now that this plan was chosen."""
        chosen = {layer.name: layer for layer in plan.layers}
        found = {}
        for name, curve in self.curves.items():
            rank = max(
                (candidate.layer.settings["rank"] for candidate in curve if candidate.layer is not None), default=0
            )
            found[name] = observed(self.problem, name, rank, self.sensitivity[name], chosen.get(name))
        return found

    def timed(self, at: int) -> float:
        """The point's latency, measured if it is missing."""
        self.points[at] = replace(self.points[at], latency=self.latency(self.points[at].plan))
        return self.points[at].latency

    def measured(self, at: int) -> Evaluation:
        """The point's evaluation, made if it is missing."""
        found = self.points[at].measured or self.evaluate(self.points[at].plan)
        self.points[at] = replace(self.points[at], measured=found)
        return found

    def drop(self, at: int) -> float:
        """How much worse than the original a point is on the search part."""
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
            steps = 2 + 2 * layers - (layers if layers > 1 else 0)  # original and check are evaluations too
            at = self._bisect(0, last, lambda i: self.drop(i) <= float(budget.max_drop or 0), steps)
            return at, self.fits(at, budget)
        at = 0
        if budget.max_bytes is not None:
            limit = budget.max_bytes
            at = next((i for i in range(last + 1) if self.points[i].predicted_bytes <= limit), last)
            while at < last and self.measured(at).bytes > limit:  # the header of the file, and padding
                at += 1
        if budget.max_latency is not None:
            slow = self._bisect(-1, last, lambda i: i < 0 or self.timed(i) > float(budget.max_latency or 0), 8)
            at = max(at, min(slow + 1, last))
        return at, self.fits(at, budget)

    def step_back(self, at: int) -> int:
        """A point towards the original with at most half the predicted damage."""
        half = self.points[at].predicted_damage / 2
        return max((i for i in range(at) if self.points[i].predicted_damage <= half), default=0)
