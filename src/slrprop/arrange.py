"""The order of the neurons between two layers, in which every block of a sparse low-rank layer is a slice."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.factors import Factors, Quantized, SparseLowRank


def arranged(
    forms: Mapping[str, Factors], feeds: Mapping[str, str], weight: Callable[[str], Factors]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Put the neurons between sparse low-rank layers and their neighbours in an order that makes sets slices.

    Args:
        forms: the layers' new factors.
        feeds: pairs of layers with only element-wise functions between.
        weight: the factors of a neighbour that has none yet.

    Returns:
        All layers that change, neighbours included, and for each whose outputs moved their order (n,): its bias follows.

    Raises:
        SlrpropError: two layers of a pair do not fit.
    """
    forms, orders = dict(forms), {}
    for first, second in feeds.items():
        if not any(isinstance(blocks_of(forms.get(name)), SparseLowRank) for name in (first, second)):
            continue
        if first == second:
            raise SlrpropError(f"the plan says that layer '{first}' feeds itself; the file is damaged")
        for name in (first, second):
            if name not in forms:
                forms[name] = weight(name)
        if forms[first].shape[1] != forms[second].shape[0]:
            raise SlrpropError(
                f"the plan says that '{first}' feeds '{second}', whose sizes differ in this model; it was made for another model"
            )
        order = orders[first] = _common_order(forms[first], forms[second])
        forms[first], forms[second] = forms[first].permuted(columns=order), forms[second].permuted(rows=order)
    return forms, orders


def blocks_of(form: Factors | None) -> Factors | None:
    """The form whose neurons have levels: quantised factors have those of their whole numbers."""
    return form.codes if isinstance(form, Quantized) else form


def _common_order(first: Factors, second: Factors) -> Tensor:
    """An order of the neurons between two layers in which both layers' sets are slices (for two levels each)."""
    count = first.shape[1]
    made_by, read_by = blocks_of(first), blocks_of(second)
    made = made_by.column_levels.long() if isinstance(made_by, SparseLowRank) else torch.zeros(count, dtype=torch.long)
    read = read_by.row_levels.long() if isinstance(read_by, SparseLowRank) else torch.zeros(count, dtype=torch.long)
    top = made == made.max()
    key = (made.max() - made) * 1024 + torch.where(top, read, read.max() - read)
    return key.argsort(stable=True)
