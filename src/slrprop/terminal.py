"""What the commands share: options and tables."""

import importlib
import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slrprop.errors import SlrpropError, finite, printable

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Processes on this machine, one thread each.")]
Cluster = Annotated[
    str | None,
    typer.Option("--cluster", help="A Ray cluster instead: ray://HOST:10001, or auto. It must see the same files."),
]
ClassAxis = Annotated[
    int | None,
    typer.Option("--class-axis", help="The outputs' axis of classes, 1 for (N, classes, H, W); found by default."),
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        help="With labels accuracy, balanced_accuracy, f1, miou, auc; agreement, cosine: points of percent. squared_error, mae, r2: in their "
        "own unit. Found by default.",
    ),
]
IgnoreLabel = Annotated[
    int | None,
    typer.Option("--ignore-label", help="A label that leaves its sample or position out; -100 always does."),
]

BatchAxis = Annotated[
    list[str] | None,
    typer.Option("--batch-axis", help="Axis of the samples: of all inputs, or by input like x=1; may be repeated."),
]


def _hush(asked: bool) -> None:
    importlib.import_module("slrprop.progress").Progress.quiet = asked


Quiet = Annotated[bool, typer.Option("--quiet", callback=_hush, help="Show no progress.")]


def axes_of(given: list[str] | None) -> int | dict[str, int] | None:
    """``--batch-axis``: an axis for all inputs, or ``input=axis`` once for each."""
    try:
        if not given or given == [given[0].replace("=", "")]:
            return int(given[0]) if given else None
        return {name: int(axis) for name, _, axis in (pair.rpartition("=") for pair in given)}
    except ValueError as error:
        raise SlrpropError(f"--batch-axis takes an axis, like 1, or input=axis, like x=1, got '{' '.join(given or [])}'") from error  # fmt: skip


def show_json(value: Any, indent: int | None = None) -> None:
    """Print what :func:`slrprop.errors.finite` makes of a value as JSON."""
    typer.echo(json.dumps(finite(value), indent=indent, allow_nan=False))


def show_table(header: list[str], rows: list[list[str]], title: str = "", wrap: tuple[str, ...] = ()) -> None:
    """Print a table, its cells as they are (no markup, nothing invisible); columns in ``wrap`` may break their lines."""
    grid = Table(*[], title=title or None, title_justify="left")
    for index, name in enumerate(header):
        grid.add_column(
            Text(printable(name)),
            justify="left" if index == 0 or name in wrap or not rows or not rows[0][index][:1].isdigit() else "right",
            no_wrap=name not in wrap,
        )
    for row in rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))
    width = None if sys.stdout.isatty() else 200
    Console(width=width).print(grid)


OPTIONS = (
    "model", "data", "method", "layers", "rank", "sparsity_rate", "reduction_rate", "class_axis", "ignore_label", "batch_axis",
)  # of plan  # fmt: skip


def parsed(settings: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; values as JSON where they are (numbers, true, false, null), else as words."""
    found = {}
    for pair in settings:
        name, equals, value = pair.partition("=")
        if not (equals and name.isidentifier()):
            raise SlrpropError(f"--set takes name=value, like bits=4, got '{pair}'")
        if name in OPTIONS:
            raise SlrpropError(f"--set can't give {name}, which has a place of its own; see: slrprop plan --help")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found
