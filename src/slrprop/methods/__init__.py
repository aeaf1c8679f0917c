"""The methods, one file each. A new one is registered by adding its ``METHOD`` here."""

from slrprop.checks import require_choice
from slrprop.methods import (
    ddlr,
    dense,
    group_lasso,
    lasso,
    low_rank,
    low_rank_plus_sparse,
    magnitude,
    nested,
    net_trim,
    obd,
    obs,
    slr,
    slr_refit,
    slrprop,
    svd,
    wanda,
)
from slrprop.methods.base import Decision, Method, Problem, Settings

_ALL = (
    svd,
    slr,
    slrprop,
    low_rank,
    nested,
    slr_refit,
    dense,
    magnitude,
    wanda,
    obd,
    obs,
    lasso,
    group_lasso,
    low_rank_plus_sparse,
    net_trim,
    ddlr,
)
METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in _ALL}


def find_method(name: str) -> Method:
    """The method of that name."""
    require_choice("method", name, METHODS)
    return METHODS[name]


__all__ = ["METHODS", "Decision", "Method", "Problem", "Settings", "find_method"]
