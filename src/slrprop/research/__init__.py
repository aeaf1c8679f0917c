"""The articles' experiments and tools, the comparison, the demonstration (extra ``research``).

Nothing but the command line imports it, and of it only ``commands``.
"""

from pathlib import Path
from typing import Any

from slrprop.checks import need_extra
from slrprop.errors import SlrpropError


def module(name: str) -> Any:
    """A module of this package, like ``paper.run``.

    Raises:
        SlrpropError: a package that it needs is not installed; the sentence names the extra.
    """
    return need_extra(f"slrprop.research.{name}", "research")


def require_seen(path: Path) -> Path:
    """A file that another process has written, by a path that must mean the same on its machine."""
    if not path.exists():
        raise SlrpropError(
            f"'{path}' is not seen here; machines that work together need a folder that all of them see (--run-dir), "
            "and a database that all of them reach (--database)"
        )
    return path
