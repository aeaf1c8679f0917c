"""The articles' experiments and tools, the comparison and the demonstration (extra ``research``): no part of what compresses networks, and nothing there imports it."""

from typing import Any

from slrprop.checks import need_extra


def module(name: str) -> Any:
    """A module of this package, like ``paper.run``.

    Raises:
        SlrpropError: a package that it needs is not installed; the sentence names the extra.
    """
    return need_extra(f"slrprop.research.{name}", "research")
