"""The search for the smallest network within a budget."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from torch import nn

from slrprop.api import no_integers, settings_of
from slrprop.checks import require_choice, require_flag
from slrprop.data import open_data
from slrprop.errors import SlrpropError
from slrprop.files import together
from slrprop.measure import file_bytes
from slrprop.methods import Problem, find_method
from slrprop.network.onnx_file import OnnxFile
from slrprop.plan import Plan
from slrprop.search.judge import LONGEST, Door, Judge, Log
from slrprop.search.path import LEVELS, SIZE_ONLY, Choice
from slrprop.search.result import Budget, BudgetError, Compression, most_evaluations, parse_size
from slrprop.search.search import Search
from slrprop.search.shares import Shares
from slrprop.search.trials import Trials
from slrprop.tune import TuneSettings


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
    level: str = "calibrated",
    methods: Mapping[str, dict[str, Any]] | Sequence[Choice] | Literal["auto"] = "auto",
    size_only: bool = False,
    tuning: TuneSettings | None = None,
    layers: str | list[str] | None = None,
    confident: bool = False,
    seed: int = 0,
    run_dir: str | Path | None = None,
    workers: int = 1,
    cluster: str | None = None,
    integer_products: bool = False,
    output: str | Path | None = None,
) -> Compression:
    """The network that meets a budget, its promise checked on data that the search did not see.

    With ``max_drop`` the smallest that was found; with bytes or latency alone the one predicted nearest to the original.

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
        level: what the search may use, ``weights`` (the factors come from the weights alone), ``calibrated`` (they are fitted
            to the data; no labels, nothing is trained) or ``tuned`` (each measured plan is fine-tuned on the original's
            outputs).
        methods: what is tried for each layer: ``"auto"``, those of the level that ``docs/comparison`` shows to be ahead, or
            methods and their settings, ``{"svd": {}, "slr": {"criterion": "weight"}}`` or pairs.
        size_only: with ``"auto"``, also forms that make the file smaller and nothing faster: single weights. They are ahead at the
            smallest sizes. Layers of more than 1024 neurons on a side get none, a fit there takes minutes.
        tuning: settings of the level ``tuned``; the other levels tune nothing.
        layers: names or patterns; None for all.
        confident: the upper end of the drop's interval must be within ``max_drop`` too.
        seed: which half of the data searches.
        run_dir: measurements are kept here; the same call goes on where a killed one stopped.
        workers: processes that share the layers' candidates, one thread each.
        cluster: a Ray cluster instead (``ray://HOST:10001`` or ``auto``; extra ``ray``); it must see a model's file under its path.
        integer_products: of an ONNX file, measured with them: see :func:`slrprop.apply`.
        output: of an ONNX file, the path that :func:`slrprop.apply` will get; nothing is written, but it is refused here already if it
            can't be. Bytes are those of the file of this name. Without it they are those of the longest name there is, where
            tensors are kept beside the file (250 bytes too many for each at most); no other file holds its own name.

    Raises:
        BudgetError: the budget can't be met; it carries the nearest compression found.
        SlrpropError: no budget, unusable data or model.
    """
    start = time.perf_counter()
    if max_drop is not None and (
        isinstance(max_drop, bool) or not isinstance(max_drop, Real) or not 0 <= float(max_drop) < math.inf
    ):
        raise SlrpropError(f"max_drop must be a finite number of points from 0, got {max_drop!r}")
    require_choice("level", level, LEVELS)
    choices, narrow = choices_of(methods, level), size_only_of(methods, level, size_only)
    if confident and evaluate:
        raise SlrpropError(
            "confident needs an interval, which a measure of your own does not have; leave one of them out"
        )
    if output is not None:
        if isinstance(model, nn.Module):
            raise SlrpropError("output is where an ONNX file is written; a module's compression has no file")
        file = OnnxFile.open(model)
        with together(*file.files, ("the data", data)) as places:
            name = file.places(output, places)[0].name
    opened = open_data(data)
    search_part, check_part = opened.split(seed)
    if isinstance(model, nn.Module):
        no_integers(integer_products)
    door = Door(model, search_part, integer_products, LONGEST if output is None else name)
    judge = Judge(model, search_part, metric, evaluate, lower_is_better)
    empty = Plan(())
    tuned = (tuning or TuneSettings()) if level == "tuned" else None
    trials = Trials(door, judge, Log(None if run_dir is None else Path(run_dir)))
    shares = Shares(trials, Problem(judge.network, search_part), choices, tuned, workers, cluster, narrow, in_file=True)
    original_bytes = file_bytes(judge.network)
    budget = Budget(
        max_drop,
        None if max_bytes is None else parse_size(max_bytes, original_bytes, "max_bytes"),
        trials.latency_limit(max_latency_ms, max_latency),
    )
    if not str(budget):
        raise SlrpropError("no budget was given; state max_drop, max_bytes or max_latency")
    shares.explore(layers)
    run = Search(shares, confident)
    at, feasible = run.choose(budget)
    if budget.max_latency is not None and run.leave_slower_dense(at):
        at, feasible = run.choose(budget)
    check = Judge(model, check_part, judge.metric, evaluate)
    before = check.quality(door.realise(empty), check.original)
    evaluations = 0
    while True:
        plan_now = run.final_at(at)
        made = door.realise(plan_now)
        if plan_now.layers and door.size(made) > original_bytes:
            at, plan_now, made = 0, empty, door.realise(empty)
            feasible = run.fits(at, budget)
        outputs = check.outputs(made) if plan_now.layers else check.original
        evaluations += 1
        after = check.quality(made, outputs)
        drop = after - before if judge.lower_is_better else before - after
        interval = (math.nan, math.nan) if evaluate else check.interval(outputs)
        within = budget.max_drop is None or (interval[1] if confident else drop) <= budget.max_drop
        spent = trials.evaluations + evaluations + 1 >= most_evaluations(len(shares.curves))
        if within or not feasible or at == 0 or spent:
            break
        at = run.step_back(at, evaluations)  # the promise did not hold on fresh data
        feasible = run.fits(at, budget)
    latency = (math.nan, math.nan) if budget.max_latency is None else (run.timed(0), run.timed(at))
    result = Compression(
        model=made, plan=plan_now, budget=budget, met=feasible and within, metric="evaluate" if evaluate else judge.metric,
        quality=(before, after), drop=drop, interval=interval, bytes=(original_bytes, door.size(made)), latency=latency,
        evaluations=trials.evaluations + evaluations + 1, points=tuple(run.points), chosen=at, curves=shares.curves, seed=seed,
        data_fingerprint=judge.fingerprint, seconds=time.perf_counter() - start,
        samples=(len(judge.original), len(check.original)), observed=shares.observed(plan_now), left_dense=shares.left_dense,
        settings={
            "model": type(model).__name__ if isinstance(model, nn.Module) else Path(model).name, "level": level, "methods": [list(choice) for choice in choices + narrow],
            "layers": layers, "metric": metric, "confident": confident,
        },
    )  # fmt: skip
    if not result.met:
        rest = original_bytes - sum(curve[0].bytes for curve in shares.curves.values())
        raise BudgetError(
            f"no plan was found for {budget}; the nearest has a drop of {drop:.2f} ({result.metric}{result.between()}) at "
            f"{result.bytes[1]:,} bytes, of which {rest:,} are not in the layers that were tried; allow more, or give more methods or layers",
            result,
        )
    return result


def choices_of(methods: Any, level: str) -> tuple[Choice, ...]:
    """The methods to try: those given, or the level's."""
    if methods == "auto":
        return LEVELS[level]
    pairs = list(methods.items()) if isinstance(methods, Mapping) else methods
    if isinstance(pairs, str) or not isinstance(pairs, Sequence) or not pairs or not all(isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[1], Mapping) for pair in pairs):  # fmt: skip
        raise SlrpropError(f"methods must be 'auto' or map names to settings, like {{'svd': {{}}}}, got {methods!r}")
    for name, settings in pairs:
        settings_of(find_method(name), **settings)
    return tuple((name, dict(settings)) for name, settings in pairs)


def size_only_of(methods: Any, level: str, size_only: bool) -> tuple[Choice, ...]:
    """What is tried beside a level's methods where only the file's size counts."""
    require_flag("size_only", size_only)
    if size_only and methods != "auto":
        raise SlrpropError("size_only adds single weights to methods='auto'; beside methods of your own, name 'obs' or 'magnitude'")  # fmt: skip
    return SIZE_ONLY[level] if size_only else ()
