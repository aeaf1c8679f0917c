"""``slrprop interpret``, and the studies of this package in ``slrprop paper``."""

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from slrprop.checks import need_extra, require_choice
from slrprop.errors import SlrpropError, finite, printable
from slrprop.files import holding, made_folder, replacing, together
from slrprop.terminal import BatchAxis, ClassAxis, IgnoreLabel, Json, axes_of, show_json, show_table

STUDIES = {"spiking-mnist": "spiking_study", "interpret-room": "interpret_study"}  # what ``slrprop paper`` hands on to


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
    tools = need_extra("slrprop.research.interpret", "research")
    if output is not None:
        need_extra("matplotlib", "research")
        results = need_extra("slrprop.paper.results", "research")
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
        drawn = importlib.import_module("slrprop.research.figures").heatmaps([file.name for file in files], entries)
        results.save_figure(drawn, output)
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


def run_study(
    name: str, data: Path | None, run_dir: Path, database: str | None, rows: Path | None, **options: Any
) -> tuple[int, Any]:
    """Compute a study's missing rows; how many, and the store that holds them."""
    study, store = opened(name, run_dir, database)
    if rows is not None:
        store.take_in(rows, name)
    loaded = importlib.import_module("slrprop.paper.datasets").DATASETS[study.DATASET](data)
    return study.run(loaded, run_dir, store=store, **options), store


def opened(name: str, run_dir: Path, database: str | None) -> tuple[Any, Any]:
    """A study's module, and the store of its rows."""
    require_choice("study", name, STUDIES)
    study = need_extra(f"slrprop.research.{STUDIES[name]}", "research")
    return study, need_extra("slrprop.paper.store", "research").Store(
        database or run_dir / "results.sqlite", study.ROW, study.KEYS
    )


def show_study(name: str, output: Path | None, run_dir: Path, database: str | None, as_json: bool) -> None:
    """Print a study's page; write its rows, page and figures."""
    need_extra("matplotlib", "research")
    study, store = opened(name, run_dir, database)
    found = store.results(name)
    if not found:
        raise SlrpropError(f"there are no results of {name} yet; compute them with: slrprop paper run {name}")
    page = study.page(found)
    typer.echo(json.dumps(finite([asdict(row) for row in found])) if as_json else page)
    if output is not None:
        results = importlib.import_module("slrprop.paper.results")
        with together():
            results.write_csv(found, made_folder(output) / f"{name}.csv")
            with replacing(output / f"{name}.md", holding(page.splitlines()[0])) as part:
                part.write_text(page)
            for file, drawn in study.figures(found, run_dir).items():
                for kind in ("png", "svg"):
                    results.save_figure(drawn, output / f"{file}.{kind}")
