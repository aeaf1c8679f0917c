"""The command line: parse, call, print."""

import importlib
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import slrprop
from slrprop.checks import need_extra
from slrprop.errors import SlrpropError, SlrpropWarning, printable
from slrprop.files import raising_on_signals, together
from slrprop.research.commands import demo, interpret
from slrprop.research.comparison.commands import compare
from slrprop.research.paper.commands import paper
from slrprop.terminal import (  # fmt: skip
    BatchAxis,
    ClassAxis,
    Cluster,
    IgnoreLabel,
    Json,
    Metric,
    Quiet,
    Workers,
    axes_of,
    parsed,
    show_json,
    show_table,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OnnxFile = Annotated[Path, typer.Argument(help="An .onnx file.", show_default=False)]
IntegerProducts = Annotated[
    bool,
    typer.Option(
        "--integer-products",
        help="Large layers of few bits multiply whole numbers: faster, inputs rounded too.",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option("--calibration", help=".npz with one array per input of the model and optional 'targets', or .npy."),
]


@app.callback(invoke_without_command=True)
def start(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Make trained networks smaller and faster by rewriting their dense weights."""
    if version:
        typer.echo(slrprop.__version__)


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="One of them: its settings and source.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods and what they need, or one method's settings and where it comes from.

    Example: slrprop methods nested
    """
    from slrprop.methods import METHODS, find_method

    chosen = list(METHODS.values()) if name is None else [find_method(name)]
    settings = {
        method.name: {key: getattr(method.settings(), key) for key in method.settings.names()} for method in chosen
    }
    needs = {method.name: ", ".join(method.needs) or "weights only" for method in chosen}
    if as_json:
        listed = [
            {
                "method": method.name, "summary": method.summary, "needs": list(method.needs),
                "settings": settings[method.name], "source": method.source,
            }
            for method in chosen
        ]  # fmt: skip
        show_json(listed, 1)
    elif name is None:
        rows = [[method.name, method.summary, needs[method.name]] for method in chosen]
        show_table(["method", "summary", "needs"], rows, wrap=("summary",))
    else:
        typer.echo(f"{chosen[0].summary}\nneeds: {needs[name]}\nsource: {chosen[0].source}")
        show_table(["setting", "default"], [[key, str(value)] for key, value in settings[name].items()])


@app.command()
def inspect(model: OnnxFile, as_json: Json = False) -> None:
    """List the layers of an ONNX file.

    Example: slrprop inspect model.onnx
    """
    found = importlib.import_module("slrprop.inspection").inspect(model)
    if as_json:
        show_json([asdict(layer) for layer in found], 1)
        return
    rows = [
        [layer.name, "{} x {}".format(*layer.shape), f"{layer.numbers:,}", f"{100 * layer.share:.1f}", str(layer.break_even_rank),
         ", ".join(layer.tied_to)]
        for layer in found
    ]  # fmt: skip
    if rows:
        show_table(["layer", "shape", "numbers", "share, %", "highest rank that pays", "weight also used by"], rows)
    else:
        typer.echo("no layer: no Gemm, MatMul, convolution or Gather has a constant weight of real numbers")
    if found.other:
        typer.echo(printable(f"other numbers, by what uses them: {found.other}"))


@app.command()
def plan(
    model: OnnxFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan (JSON).")],
    calibration: Calibration = None,
    method: Annotated[str, typer.Option(help="See: slrprop methods")] = "slrprop",
    rank: Annotated[int, typer.Option(help="Singular triplets kept.")] = 16,
    layers: Annotated[list[str] | None, typer.Option(help="Name or pattern; may be repeated.")] = None,
    sparsity_rate: Annotated[float, typer.Option(help="Share of the neurons that are shortened.")] = 0.5,
    reduction_rate: Annotated[float, typer.Option(help="Share of the rank that a shortened neuron keeps.")] = 0.5,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Further setting of the method, like bits=4; may be repeated.")
    ] = None,
    class_axis: ClassAxis = None,
    ignore_label: IgnoreLabel = None,
    batch_axis: BatchAxis = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Decide for each layer of an ONNX file what to do with it.

    Forms that are fitted to the data are written beside the plan, as .safetensors.

    Example: slrprop plan model.onnx --calibration data.npz --method nested --rank 16 --set bits=4 -o plan.json
    """
    plans, reads = importlib.import_module("slrprop.plan"), [("the model itself", model), ("the data", calibration)]
    with together(*reads) as outputs:
        for place, refusal in ((output, plans.no_plan), plans.places(output)):
            outputs.place(place, refusal)
    made = importlib.import_module("slrprop.api").plan(
        model, calibration, method, layers or None, rank, sparsity_rate, reduction_rate, class_axis, ignore_label, axes_of(batch_axis),
        **parsed(settings or []),
    )  # fmt: skip
    with together(*reads):
        made.save(output)
    typer.echo(made.to_json() if as_json else f"{made}\n" + printable(f"Written: {output}"))


@app.command("apply")
def apply_plan(
    model: OnnxFile,
    plan: Annotated[Path, typer.Argument(help="A plan that slrprop plan wrote.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")],
    calibration: Calibration = None,
    integer_products: IntegerProducts = False,
    batch_axis: BatchAxis = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Carry a plan out; the new file's outputs are compared (on the data, or on made-up inputs) before it is kept.

    Example: slrprop apply model.onnx plan.json -o small.onnx
    """
    plans = importlib.import_module("slrprop.plan")
    loaded = plans.Plan.load(plan)
    with together(("the plan", plan), ("the plan's factors", plans.beside(plan))):
        parity = importlib.import_module("slrprop.api").apply(
            model, loaded, output, calibration, integer_products, axes_of(batch_axis)
        )
    files = importlib.import_module("slrprop.network.onnx.file").OnnxFile
    before, after = files.open(model).bytes, files.open(output).bytes
    if as_json:
        show_json(asdict(parity) | {"bytes": after, "bytes_before": before, "file": str(output)})
        return
    for name, apart in parity.outputs.items():
        told = f"output '{name}': at most {apart:.1e} from the factors' values (allowed: {parity.tolerance:.0e} of the largest)"
        typer.echo(printable(told))
    if calibration is None:
        typer.echo("(on made-up inputs, which may not reach every part of a network; --calibration compares on yours)")
    typer.echo(printable(f"Written: {output}, {after:,} bytes instead of {before:,}"))


@app.command()
def measure(
    model: OnnxFile,
    data: Annotated[Path, typer.Option("--data", help=".npz with one array per input of the model, and 'targets'.")],
    against: Annotated[Path | None, typer.Option("--against", help="Another .onnx file to compare with.")] = None,
    class_axis: ClassAxis = None,
    ignore_label: IgnoreLabel = None,
    batch_axis: BatchAxis = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure an ONNX file on labels or real targets, alone or against another file; without them against another file only.

    Example: slrprop measure small.onnx --data test.npz --against model.onnx
    """
    samples = importlib.import_module("slrprop.data").Data(data, batch_axis=axes_of(batch_axis))
    run = importlib.import_module("slrprop.measure").measure
    found = {str(model): asdict(run(model, samples, against, class_axis, ignore_label))}
    if against is not None:
        found[str(against)] = asdict(run(against, samples, against, class_axis, ignore_label))
    if as_json:
        show_json(found, 1)
        return
    metrics = {name: [item[name] for item in found.values()] for name in next(iter(found.values()))}
    rows = [
        [name, *(f"{x:,}" if isinstance(x, int) else "-" if x != x else f"{x:.2f}" for x in values)]
        for name, values in metrics.items()
        if any(x == x for x in values)
    ]
    show_table(["", *found], rows)


def _require_ending(path: Path, *endings: str) -> None:
    """Find out before the work whether the name is one."""
    if path.suffix.lower() not in endings:
        raise SlrpropError(f"'{path}' must end in {' or '.join(endings)}")


@app.command()
def compress(
    model: OnnxFile,
    calibration: Annotated[
        Path,
        typer.Option("--calibration", help=".npz or .npy; half searches, half checks and must be unseen by training."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")],
    check: Annotated[
        Path | None, typer.Option(help="Checking samples apart, unseen by training; the others only search.")
    ] = None,
    max_drop: Annotated[float | None, typer.Option(help="Points of the metric that may be lost; see --metric.")] = None,
    max_bytes: Annotated[str | None, typer.Option(help="Size of the file: 300KB, or 25% of the original.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Milliseconds for one sample on one thread.")] = None,
    max_latency: Annotated[str | None, typer.Option(help="The same as a share of the original's: 50%.")] = None,
    metric: Metric = None,
    class_axis: ClassAxis = None,
    ignore_label: IgnoreLabel = None,
    level: Annotated[str, typer.Option(help="What it may use: weights, calibrated or tuned.")] = "calibrated",
    method: Annotated[list[str], typer.Option(help="May be repeated; auto: those of the level.")] = ["auto"],  # noqa: B006
    size_only: Annotated[
        bool, typer.Option(help="Also forms that make only the file smaller, nothing faster.")
    ] = False,
    layers: Annotated[list[str] | None, typer.Option(help="Name or pattern; may be repeated.")] = None,
    confident: Annotated[bool, typer.Option(help="The upper end of the drop's interval must hold too.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the samples, so of the parts.")] = 0,
    run_dir: Annotated[
        Path | None, typer.Option(help="Keep measurements here; a killed run goes on from them.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write an .html or .md report.")] = None,
    workers: Workers = 1,
    cluster: Cluster = None,
    integer_products: IntegerProducts = False,
    batch_axis: BatchAxis = None,
    keep_batch_norm: Annotated[
        bool, typer.Option(help="Leave batch norms where they are; else layers take in those right behind them.")
    ] = False,
    block: Annotated[int, typer.Option(help="Ranks under a budget on latency are multiples of it; 1: free.")] = 16,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compress an ONNX file within a budget, checked on data the search did not see.

    With --max-drop: the smallest file found. With bytes or latency alone: the plan predicted nearest to the original.

    The samples that check must not have been trained on; what is promised holds for samples like them.

    Exit codes: 0 written, 1 a mistake, 2 a misspelt command, 3 the budget can't be met (no ONNX file is written).

    Example: slrprop compress model.onnx --calibration data.npz --max-drop 0.5 -o small.onnx --report report.html
    """
    _require_ending(output, ".onnx")
    search, reports = importlib.import_module("slrprop.search"), importlib.import_module("slrprop.report")
    command = ["slrprop", *sys.argv[1:]]
    reads = [("the model itself", model), ("the data", calibration), ("the checking samples", check)]
    if report is not None:
        _require_ending(report, ".html", ".md")
        if report.suffix == ".html":
            need_extra("plotly", "report")
        with together(*reads) as outputs:
            outputs.place(report, reports.no_report)
    try:
        found = search.compress(
            model, calibration, check=check, max_drop=max_drop, max_bytes=max_bytes, max_latency_ms=max_latency_ms, max_latency=max_latency,
            metric=metric, class_axis=class_axis, ignore_label=ignore_label, level=level, methods="auto" if method == ["auto"] else [(name, search.QUICK.get(name, {})) for name in method],
            size_only=size_only, layers=layers or None, confident=confident, seed=seed, run_dir=run_dir,
            workers=workers, cluster=cluster, integer_products=integer_products, output=output, batch_axis=axes_of(batch_axis),
            keep_batch_norm=keep_batch_norm, block=block,
        )  # fmt: skip
    except search.BudgetError as error:
        if report is not None and error.best is not None:
            with together(*reads):
                reports.write_report(error.best, report, command)
        if as_json:
            show_json({"met": False, "error": str(error)} if error.best is None else error.best.summary())
        typer.echo(f"error: {error}", err=True)
        sys.exit(3)
    with together(*reads):
        parity = importlib.import_module("slrprop.api").apply(
            model, found.plan, output, calibration, integer_products, axes_of(batch_axis)
        )
        if report is not None:
            reports.write_report(found, report, command, parity.outputs)
    if as_json:
        show_json(found.summary() | {"file": str(output), "parity": asdict(parity)})
        return
    if found.plan.layers:
        typer.echo(found.plan)
        typer.echo("\n".join(printable(f"why {reason}") for reason in found.reasons()))
    typer.echo(str(found))
    typer.echo(
        printable(f"Written: {output}; it computes what the plan says to within {max(parity.outputs.values()):.1e}")
    )
    if report is not None:
        typer.echo(printable(f"Report: {report}"))


for command in (demo, compare, interpret):
    app.command()(command)
app.add_typer(paper, name="paper")


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence and exit code 1, a signal (Ctrl-C, SIGTERM, SIGHUP) in 128 and its number."""
    for name in ("stdout", "stderr"):  # where one is closed, nothing that is opened later may take its number
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))  # noqa: SIM115
    plainly = warnings.formatwarning
    warnings.formatwarning = lambda text, kind, *rest: f"note: {text}\n" if kind is SlrpropWarning else plainly(text, kind, *rest)  # fmt: skip
    try:
        with raising_on_signals(lambda number: SystemExit(128 + number)):
            app()
    except (SlrpropError, OSError) as error:
        typer.echo(f"error: {printable(str(error))}", err=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code in (129, 130, 143):  # 130 is what typer makes of Ctrl-C
            typer.echo("interrupted; what takes a --run-dir goes on from there at the next call", err=True)
        raise
