"""``slrprop demo`` and ``slrprop interpret``."""

import importlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from slrprop.checks import need_extra
from slrprop.errors import SlrpropError, printable
from slrprop.files import holding, together
from slrprop.research import module
from slrprop.research.paper.commands import Output
from slrprop.terminal import BatchAxis, ClassAxis, IgnoreLabel, Json, Quiet, axes_of, show_json, show_table


def interpret(
    model: Annotated[Path, typer.Argument(help="An .onnx file.", show_default=False)],
    data: Annotated[
        Path, typer.Option("--data", help=".npz with the model's one input, and 'targets' to compare with.")
    ],
    against: Annotated[Path | None, typer.Option("--against", help="The compressed .onnx file.")] = None,
    by: Annotated[
        str, typer.Option(help="product of the layers' matrices, mean gradients over the data, or auto.")
    ] = "auto",
    top: Annotated[int, typer.Option(min=1, help="Inputs named for each output.")] = 5,
    output: Annotated[Path | None, typer.Option("--output", help="Also draw the matrices: a .png or .svg.")] = None,
    class_axis: ClassAxis = None,
    ignore_label: IgnoreLabel = None,
    batch_axis: BatchAxis = None,
    as_json: Json = False,
) -> None:
    """Say which inputs drive which outputs, and whether a compressed file decides by the same ones.

    The network is collapsed into one matrix, inputs x outputs; its entries are for a change of an input by one standard deviation. Where one of
    both files is no chain of dense layers, both are collapsed by gradients.

    Example: slrprop interpret model.onnx --data data.npz --against small.onnx --output interpret.png
    """
    tools = module("interpret")
    if output is not None:
        need_extra("matplotlib", "research")
        tables = module("tables")
        if output.suffix not in (".png", ".svg"):
            raise SlrpropError(f"--output must end in .png or .svg, got '{output}'")
        with together(*((f"'{path}', an input", path) for path in (model, data, against))) as outputs:
            outputs.place(output, holding("Matplotlib"))  # before the work
    samples = importlib.import_module("slrprop.data").Data(
        data, class_axis=class_axis, ignore_label=ignore_label, batch_axis=axes_of(batch_axis)
    )
    files = [model] if against is None else [model, against]
    way, matrices = tools.collapse_alike(files, samples, by)
    if matrices[0].shape != matrices[-1].shape:
        shapes = " and ".join(str(tuple(matrix.shape)) for matrix in matrices)
        raise SlrpropError(f"networks of other inputs or outputs can't be compared: they collapse to {shapes}")
    entries = [tools.effects(matrix, samples) for matrix in matrices]
    drivers = [_drivers(matrix, top) for matrix in entries]
    targets = next(iter(samples)).targets
    known = getattr(targets, "ndim", 0) == 1 and "float" not in str(targets.dtype)
    likeness = [tools.compare(matrix, samples, file) for file, matrix in zip(files, matrices, strict=True) if known]
    apart = [tools.correlation(*pair) for pair in zip(entries[0].T, entries[-1].T, strict=True)]
    told = {
        "by": way, "files": list(map(str, files)), "drivers": drivers, "alike": tools.correlation(entries[0], entries[-1]),
        "alike_by_output": apart, "likeness": [asdict(one) for one in likeness], "effects": [matrix.tolist() for matrix in entries],
    }  # fmt: skip
    if output is not None:
        drawn = module("figures").heatmaps([file.name for file in files], entries)
        tables.save_figure(drawn, output)
    if as_json:
        show_json(told)
        return
    rows = []
    for k, alike in enumerate(apart):
        named = [", ".join(f"{index}: {value:+.3g}" for index, value in of_file[k]) for of_file in drivers]
        rows.append([f"output {k}", *named, *([f"{alike:.3f}"] if against else [])])
    header = ["", *(file.name for file in files), *(["correlation"] if against else [])]
    what = "product of the layers' matrices" if way == "product" else "mean gradients"
    show_table(header, rows, f"input: effect of one standard deviation, the strongest first; {what}", tuple(header[1:]))
    for file, one in zip(files, likeness, strict=False):
        typer.echo(
            f"{printable(file.name)}: correlation with the data's input-target correlations {one.correlation:.3f}, "
            f"with logistic regression {one.logistic:.3f}, with permutation importance {one.permutation:.3f}"
        )
    if against is not None:
        common = [len({i for i, _ in a} & {i for i, _ in b}) for a, b in zip(*drivers, strict=True)]
        typer.echo(
            f"Both files: correlation of all effects {told['alike']:.3f}; of the {top} strongest inputs of an output "
            f"{sum(common) / len(common):.1f} are the same on average"
        )
    if output is not None:
        typer.echo(f"Written: {output}")


def _drivers(effects: Any, top: int) -> list[list[tuple[int, float]]]:
    """For each output the inputs of the largest effects (m x c), strongest first, and these effects."""
    order = effects.abs().argsort(dim=0, descending=True, stable=True)[:top].T.tolist()
    return [[(i, float(column[i])) for i in first] for first, column in zip(order, effects.T, strict=True)]


def demo(output: Output = Path("build/demo"), quiet: Quiet = False, as_json: Json = False) -> None:
    """Train a small network on scikit-learn's digits, compress it, measure it.

    Example: slrprop demo --output build/demo
    """
    need_extra("matplotlib", "research")
    rows, best = module("demo").run(output)
    if as_json:
        show_json({"rows": [asdict(row) for row in rows], "chosen": best.name, "onnx": str(output / "demo.onnx")})
        return
    original = rows[0]
    lines = [
        [row.name, f"{row.numbers:,}", f"{row.bytes / 1000:,.1f}", f"{original.bytes / row.bytes:.1f}x", f"{row.choosing:.1f}",
         f"{row.testing:.1f}", f"{1e6 * row.latency:.0f}", f"{original.latency / row.latency:.1f}x"]
        for row in rows
    ]  # fmt: skip
    header = ["network", "numbers", "ONNX file, kB", "smaller", "accuracy, choosing %", "accuracy, test %", "latency, µs", "faster"]  # fmt: skip
    show_table(
        header,
        lines,
        "Handwritten digits, 64-768-768-768-10; the two 768 x 768 layers compressed; ONNX Runtime, batch 1, 1 thread",
    )
    typer.echo(
        f"Smallest file within 1 point of the original on the choosing part: {best.name}: {original.bytes / best.bytes:.1f}x smaller, "
        f"{original.latency / best.latency:.1f}x faster, test accuracy {original.testing:.1f} -> {best.testing:.1f} %."
    )
    typer.echo(
        f"Written: {', '.join(str(output / name) for name in ('demo.onnx', 'demo.png', 'original.onnx', 'data.npz'))}"
    )
    typer.echo(
        f"Next: slrprop compress {output / 'original.onnx'} --calibration {output / 'data.npz'} --max-drop 0.5 "
        "-o small.onnx --report report.html"
    )
