"""The search for the smallest network within a budget."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from torch import nn

from slrprop.api import no_integers, settings_of
from slrprop.checks import require_choice, require_count, require_flag
from slrprop.data import Axes, Data, open_data
from slrprop.errors import SlrpropError
from slrprop.files import together
from slrprop.inspection import warn_if_compressed
from slrprop.measure import file_bytes
from slrprop.methods import Problem, find_method
from slrprop.network import folded, open_network
from slrprop.network.onnx.file import OnnxFile
from slrprop.plan import Plan
from slrprop.search.blocks import BLOCK
from slrprop.search.check import Check
from slrprop.search.judge import LONGEST, Door, Judge, Log
from slrprop.search.path import BYTES, LEVELS, SIZE_ONLY, Choice
from slrprop.search.reach import reach_of
from slrprop.search.result import Budget, BudgetError, Compression, parse_size
from slrprop.search.search import Search
from slrprop.search.shares import Shares
from slrprop.search.times import Times, cost_of
from slrprop.search.trials import Trials
from slrprop.selection import treated
from slrprop.tune import TuneSettings, require_tunable

CHOOSING = 3  # the part of the search's samples that only chooses: one of so many, where others are fitted to
LEARNT = 99.5  # percent: an original that is right more often has probably seen the samples before


def compress(
    model: Any,
    data: Any,
    *,
    check: Any = None,
    max_drop: float | None = None,
    max_bytes: int | str | None = None,
    max_latency_ms: float | None = None,
    max_latency: str | None = None,
    metric: str | None = None,
    evaluate: Callable[..., Any] | None = None,
    lower_is_better: bool = False,
    class_axis: int | None = None,
    ignore_label: int | None = None,
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
    batch_axis: Axes = None,
    keep_batch_norm: bool = False,
    block: int = BLOCK,
) -> Compression:
    """The network that meets a budget, its promise checked on data that the search did not see.

    With ``max_drop`` the smallest that was found, the original if nothing smaller holds; with bytes or latency alone the one
    predicted nearest to the original.

    Args:
        model: a torch module or the path of an ONNX file; untouched.
        data: labelled or not. Half of it is for the check, and the model must not have been trained on that: what is promised
            holds for samples like those. Of the other half two thirds are what forms are fitted to and tuned on, and by the rest they are chosen.
        check: samples for the check alone; ``data`` then serves the search, and may have been trained on.
        max_drop: how much of the metric may be lost: points of percent, or of ``squared_error``, ``mae`` and ``r2`` in their
            own unit. By so much an error may grow.
        max_bytes: size of the file, a number, ``"300KB"`` or ``"25%"`` of the original.
        max_latency_ms: milliseconds for one sample in ONNX Runtime on one thread.
        max_latency: the same as a share of the original's, ``"50%"``.
        metric: of :data:`slrprop.metrics.MEANING`, in percent ``accuracy``, ``balanced_accuracy``, ``f1`` (mean over classes), ``miou`` and
            ``auc`` of labels, ``agreement`` with the original's answers, and ``cosine`` similarity; ``squared_error``, ``mae`` and ``r2`` in
            their own unit. Found by default: see ``docs/metrics.md``.
        evaluate: your own measure instead. It takes a torch module or the path of an ONNX file, and as a second argument, if it has one,
            the :class:`slrprop.data.Data` to measure on: what the search chooses by, and for the check what it did not see. It gives a
            number, or an array of one value a sample, whose mean counts; then the drop has an interval.
        lower_is_better: for ``evaluate``.
        class_axis: the axis of the network's outputs that holds the classes; found by default.
        ignore_label: a label that leaves its sample or position out; -100 always does.
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
        seed: of the order of the samples, and so of the parts.
        run_dir: measurements are kept here; the same call goes on where a killed one stopped.
        workers: processes that share the layers' candidates, one thread each.
        cluster: a Ray cluster instead (``ray://HOST:10001`` or ``auto``; extra ``ray``); it must see a model's file under its path.
        integer_products: of an ONNX file, measured with them: see :func:`slrprop.apply`.
        output: of an ONNX file, the path that :func:`slrprop.apply` will get; nothing is written, but it is refused here already if it
            can't be. Bytes are those of the file of this name. Without it they are those of the longest name there is, where
            tensors are kept beside the file (250 bytes too many for each at most); no other file holds its own name.
        batch_axis: where samples stand in the data, see :class:`slrprop.data.Data`.
        keep_batch_norm: leave batch norms where they are. Else those right behind a layer are put into it first, which changes
            nothing that is computed.
        block: with a budget on latency, ranks that are tried are multiples of so many, where a layer has twice as many channels on both
            sides: numbers that a processor multiplies at once (16 with AVX-512, 8 with AVX2 and NEON). 1 leaves them free.

    Raises:
        BudgetError: the budget can't be met; it carries the nearest compression found, or none where bytes were asked for that no plan
            can be within, which is said before any work.
        SlrpropError: no budget, unusable data or model.
    """
    start = time.perf_counter()
    if max_drop is not None and (
        isinstance(max_drop, bool) or not isinstance(max_drop, Real) or not 0 <= float(max_drop) < math.inf
    ):
        raise SlrpropError(f"max_drop must be a finite number of points from 0, got {max_drop!r}")
    require_choice("level", level, LEVELS)
    block = require_count("block", block, least=1)
    choices, narrow = choices_of(methods, level), size_only_of(methods, level, size_only)
    source = OnnxFile.open(model) if isinstance(model, (str, Path)) else model
    if output is not None:
        if not isinstance(source, OnnxFile):
            raise SlrpropError("output is where an ONNX file is written; a module's compression has no file")
        with together(*source.files, ("the data", data), ("the checking samples", check)) as places:
            name = source.places(output, places)[0].name
    warn_if_compressed(source)
    opened = open_data(data, class_axis, ignore_label, batch_axis)
    network = open_network(source, opened)  # where its samples stand shows before it is cut
    norms = {} if keep_batch_norm else network.norms
    source = folded(source, norms)
    search_part, check_part = parts_of(opened, data, check, seed, class_axis, ignore_label, batch_axis)
    fitting_part, choosing_part = search_part, search_part
    tuned = (tuning or TuneSettings()) if level == "tuned" else None
    fits = any(find_method(name).settings(**given).needs() for name, given in choices + narrow)
    if (tuned or fits) and not search_part.fewer(CHOOSING):
        fitting_part, choosing_part = search_part.split(seed, CHOOSING)
    if isinstance(model, nn.Module):
        no_integers(integer_products)
    door = Door(source, fitting_part, integer_products, LONGEST if output is None else name)
    problem = Problem(open_network(source, fitting_part), fitting_part)
    names, _ = treated(problem.network, "dense", find_method("dense").settings(bits=8), layers)
    original_bytes = file_bytes(network)
    most_bytes = None if max_bytes is None else parse_size(max_bytes, original_bytes, "max_bytes")
    written = min(original_bytes, door.size(door.realise(Plan(()), sharing=True)))  # what no graph reads is not copied
    reach = reach_of(problem.network, names, choices + narrow, written)
    if most_bytes is not None and most_bytes < reach.least < written:
        raise BudgetError(f"no plan can be within at most {most_bytes:,} bytes: {reach}; allow more, or give more methods or layers")  # fmt: skip
    if tuned:
        require_tunable(problem.network, fitting_part, names)
    judge = Judge(source, choosing_part, metric, evaluate, lower_is_better)
    problem.network.reading = judge.network.reading  # forms are fitted to what is judged
    check_judge = Judge(source, check_part, judge.metric, evaluate, lower_is_better)
    trials = Trials(door, judge, Log(None if run_dir is None else Path(run_dir)), check_judge.samples)
    if confident and trials.original.influence is None:
        raise SlrpropError(
            "confident needs an interval, which a measure has only where it gives one value a sample; let evaluate give an array"
        )
    budget = Budget(max_drop, most_bytes, trials.latency_limit(max_latency_ms, max_latency), judge.change)
    block = 1 if budget.max_latency is None else block
    shares = Shares(trials, problem, choices, tuned, workers, cluster, narrow, in_file=True, block=block)
    if not str(budget):
        raise SlrpropError("no budget was given; state max_drop, max_bytes or max_latency")
    shares.explore(layers)
    cost = BYTES
    if budget.max_latency is not None:
        shares.time(Times(problem.network, trials.log, integer_products))
        cost = cost_of(budget, original_bytes)
    run = Search(shares, confident, cost)
    at, _ = run.choose(budget)
    checked = Check(check_judge, door, budget, confident)
    at, feasible, look = run.promised(at, budget, checked, original_bytes)
    evaluations, plan_now = trials.evaluations + checked.looks + 1, run.final_at(at)
    latency = (math.nan, math.nan) if budget.max_latency is None else (run.timed(0), run.timed(at))
    result = Compression(
        model=look.made, plan=replace(plan_now, folded=norms), budget=budget, met=feasible and look.within, metric="evaluate" if evaluate else judge.metric,
        quality=(checked.before.value, look.quality), drop=look.drop, interval=look.interval, bytes=(original_bytes, door.size(look.made)),
        latency=latency, evaluations=evaluations, points=tuple(run.points), chosen=at, curves=shares.curves, seed=seed,
        data_fingerprint=judge.fingerprint, seconds=time.perf_counter() - start,
        samples=(judge.samples, check_judge.samples), observed=shares.observed(plan_now), left_dense=shares.left_dense,
        looks=checked.looks, needed=checked.needed, learnt=judge.metric == "accuracy" and checked.before.value > LEARNT,
        settings={
            "model": type(model).__name__ if isinstance(model, nn.Module) else Path(model).name, "level": level, "methods": [list(choice) for choice in choices + narrow],
            "layers": layers, "metric": metric, "confident": confident,
        },
        reason="" if evaluate else judge.reason, change=judge.change, beside=look.beside, notes=tuple(check_judge.notes),
    )  # fmt: skip
    if not result.met:
        nearest = "is the original" if at == 0 else f"has a {judge.change} of {result.number(look.drop)} ({result.metric}{result.between()}) at {result.bytes[1]:,} bytes"  # fmt: skip
        raise BudgetError(f"no plan was found for {budget}{result.enough()}; the nearest {nearest}; {reach}; allow more, or give more methods or layers", result)  # fmt: skip
    return result


def parts_of(opened: Data, data: Any, check: Any, seed: int, *read: Any) -> tuple[Data, Data]:
    """What the search sees, and what it does not; how it is read as in :func:`slrprop.data.open_data`."""
    if check is None:
        return opened.split(seed)
    paths = [Path(given) for given in (data, check) if isinstance(given, (str, Path))]
    if check is data or (len(paths) == 2 and all(path.exists() for path in paths) and paths[0].samefile(paths[1])):
        raise SlrpropError("check names the very samples that the search sees; give others, or leave it out, and half of the data is kept for it")  # fmt: skip
    return opened, open_data(check, *read)


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
