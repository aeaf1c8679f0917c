"""What the commands share: options and tables."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slrprop.errors import printable

Output = Annotated[Path, typer.Option("--output", help="Folder to write to.")]
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
