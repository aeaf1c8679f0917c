"""The methods, one file each. A new one is registered by adding its ``METHOD`` here."""

from slrprop.checks import require_choice
from slrprop.methods import ddlr, dense, low_rank, nested, slr, slr_refit, slrprop, svd
from slrprop.methods.base import Decision, Method, Problem, Settings

_ALL = (svd, slr, slrprop, low_rank, nested, slr_refit, dense, ddlr)
METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in _ALL}


def find_method(name: str) -> Method:
    """The method of that name."""
    require_choice("method", name, METHODS)
    return METHODS[name]


__all__ = ["METHODS", "Decision", "Method", "Problem", "Settings", "find_method"]
