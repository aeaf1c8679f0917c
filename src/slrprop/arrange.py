"""The neurons between two layers: those that the second does not read go, the others get an order that makes sets slices."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.factors import Dense, Factors, Narrowed, Quantized, SparseLowRank


def arranged(
    forms: Mapping[str, Factors], feeds: Mapping[str, str], weight: Callable[[str], Factors]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Remove the neurons between two layers that the second does not read, and make sets of the others slices.

    Only element-wise functions stand between, so what nobody reads can go: the first layer loses outputs, the second
    inputs, and what the network computes stays the same.

    Args:
        forms: the layers' new factors.
        feeds: pairs of layers with only element-wise functions between.
        weight: the factors of a neighbour that has none yet.

    Returns:
        All layers that change, neighbours included, and for each whose outputs moved or went the ones that it has now, in
        their order: its bias follows.

    Raises:
        SlrpropError: two layers of a pair do not fit.
    """
    forms, orders = dict(forms), {}
    for first, second in feeds.items():
        unread = second in forms and not bool(forms[second].read().all())
        sets = any(isinstance(blocks_of(forms.get(name)), (SparseLowRank, Narrowed)) for name in (first, second))
        if not sets and not unread:
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
        order = _common_order(forms[first], forms[second]) if sets else torch.arange(forms[first].shape[1])
        if unread and forms[first].selects and forms[second].selects:
            here = forms[second].read()[order]
            order = order[here] if here.any() else order[:1]  # a layer keeps one output at least
        orders[first] = order
        forms[first], forms[second] = forms[first].permuted(columns=order), forms[second].permuted(rows=order)
    return {name: _simplest(form) for name, form in forms.items()}, orders


def _simplest(form: Factors) -> Factors:
    """A narrowed layer that has lost no neuron, or none any more, is a dense one."""
    blocks = blocks_of(form)
    if not isinstance(blocks, Narrowed) or not blocks.whole:
        return form
    if isinstance(form, Quantized):
        return replace(form, codes=Dense(blocks.block), scales={"weight": form.scales["block"]})
    return Dense(blocks.block)


def blocks_of(form: Factors | None) -> Factors | None:
    """The form whose neurons have levels: quantised factors have those of their whole numbers."""
    return form.codes if isinstance(form, Quantized) else form


def _common_order(first: Factors, second: Factors) -> Tensor:
    """An order of the neurons between two layers in which both layers' sets are slices (for two levels each)."""
    count = first.shape[1]
    made, read = torch.zeros(2, count, dtype=torch.long)
    made_by, read_by = blocks_of(first), blocks_of(second)
    if isinstance(made_by, (SparseLowRank, Narrowed)):
        made = (made_by.column_levels if isinstance(made_by, SparseLowRank) else made_by.columns).long()
    if isinstance(read_by, (SparseLowRank, Narrowed)):
        read = (read_by.row_levels if isinstance(read_by, SparseLowRank) else read_by.rows).long()
    top = made == made.max()
    key = (made.max() - made) * 1024 + torch.where(top, read, read.max() - read)
    return key.argsort(stable=True)
