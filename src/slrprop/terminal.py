"""What the commands share: options, tables, optional extras."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from slrprop.errors import SlrpropError

Output = Annotated[Path, typer.Option("--output", help="Folder to write to.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def show_table(header: list[str], rows: list[list[str]], title: str = "", wrap: tuple[str, ...] = ()) -> None:
    """Print a table; columns in ``wrap`` may break their lines."""
    grid = Table(*[], title=title or None, title_justify="left")
    for index, name in enumerate(header):
        grid.add_column(
            name,
            justify="left" if index == 0 or name in wrap or not rows or not rows[0][index][:1].isdigit() else "right",
            no_wrap=name not in wrap,
        )
    for row in rows:
        grid.add_row(*row)
    width = None if sys.stdout.isatty() else 200
    Console(width=width).print(grid)


def need_extra(module: str, extra: str) -> Any:
    """Import a module of an optional extra.

    Raises:
        SlrpropError: it is not installed; the sentence names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("slrprop"):
            raise
        raise SlrpropError(
            f"this command needs the package '{error.name}'; install it with: pip install 'slrprop[{extra}]'"
        ) from error
