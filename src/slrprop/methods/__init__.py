"""The methods, one file each. A new one is registered by adding its module's name here."""

from importlib import import_module

from slrprop.checks import require_choice
from slrprop.errors import SlrpropError
from slrprop.methods.base import METHOD_OF, Decision, Method, Problem, Settings

NAMES = (
    "svd slr slrprop slr_refit low_rank nested spatial tucker low_rank_plus_sparse dense rtn magnitude wanda obd obs lasso "
    "group_lasso nisp taylor lrp apoz redundant permuted net_trim ddlr"
)
for name in NAMES.split():
    import_module(f"slrprop.methods.{name}")
METHODS: dict[str, Method] = {name: METHOD_OF[name] for name in NAMES.split()}


def find_method(name: str) -> Method:
    """The method of that name."""
    if name == "auto":
        raise SlrpropError("'auto' chooses among methods within a budget: call compress, or name one method")
    require_choice("method", name, METHODS)
    return METHODS[name]


__all__ = ["METHODS", "Decision", "Method", "Problem", "Settings", "find_method"]
