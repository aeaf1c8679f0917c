"""The channels of a junction: those that no layer reads go, the others get an order that makes sets slices."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.forms import Dense, Form, Narrowed, Quantized, SparseLowRank
from slrprop.network.junction import Junction


def arranged(
    forms: Mapping[str, Form], junctions: Iterable[Junction], weight: Callable[[str], Form]
) -> tuple[dict[str, Form], dict[str, Tensor]]:
    """Remove the channels of junctions that no layer reads, and make sets of the others slices.

    Each goes its own way between the layers, so what nobody reads can go: makers lose outputs, readers inputs, carriers numbers,
    and what the network computes stays the same.

    Args:
        forms: the layers' new factors.
        weight: the factors of a neighbour that has none yet.

    Returns:
        All layers that change, neighbours included, and for each maker and carrier whose channels moved or went the ones that it
        has now, in their order: a maker's bias follows.

    Raises:
        SlrpropError: the layers of a junction do not fit.
    """
    forms, orders = dict(forms), dict[str, Tensor]()
    for junction in junctions:
        makers, readers, names = junction.makers, junction.readers, junction.layers
        moving = {*makers, *junction.carriers}
        if not makers or not readers or len({*names}) < len(names) or not orders.keys().isdisjoint(moving):
            raise SlrpropError(f"the plan says that {junction}, which can't be; the file is damaged")
        sets = any(isinstance(blocks_of(forms.get(name)), (SparseLowRank, Narrowed)) for name in names)
        unread = all(name in forms and not bool(forms[name].read().all()) for name in readers)
        if not sets and not unread:
            continue
        forms |= {name: weight(name) for name in names if name not in forms}
        count = forms[makers[0]].shape[1]
        sizes = {forms[name].shape[1] == count for name in makers} | {forms[name].shape[0] == count * readers[name] for name in readers}  # fmt: skip
        if sizes != {True}:
            raise SlrpropError(f"the plan says that {junction}, whose sizes differ in this model; it was made for another model")  # fmt: skip
        made, reads = _levels(forms[makers[0]], "column", count), _levels(forms[next(iter(readers))], "row", count)
        order = _common_order(made, reads) if sets else torch.arange(count)
        if unread and all(forms[name].selects for name in names):
            here = torch.stack([forms[name].read().cpu().reshape(count, -1).any(1) for name in readers]).any(0)[order]
            order = order[here] if here.any() else order[:1]  # a layer keeps one output at least
        orders |= dict.fromkeys(moving, order)
        for name in makers:
            forms[name] = forms[name].permuted(columns=order)
        for name, unit in readers.items():
            forms[name] = forms[name].permuted(rows=(order[:, None] * unit + torch.arange(unit)).flatten())
    return {name: _simplest(form) for name, form in forms.items()}, orders


def _simplest(form: Form) -> Form:
    """A narrowed layer that has lost no neuron, or none any more, is a dense one."""
    blocks = blocks_of(form)
    if not isinstance(blocks, Narrowed) or not blocks.whole:
        return form
    if isinstance(form, Quantized):
        return replace(form, codes=Dense(blocks.block), scales={"weight": form.scales["block"]})
    return Dense(blocks.block)


def blocks_of(form: Form | None) -> Form | None:
    """The form whose neurons have levels: quantised factors have those of their whole numbers."""
    return form.codes if isinstance(form, Quantized) else form


def _levels(form: Form, side: str, count: int) -> Tensor:
    """How many blocks each of so many channels takes part in, on one side of a form: the most that any of its rows does."""
    blocks, levels = blocks_of(form), torch.zeros(count, dtype=torch.long)
    if isinstance(blocks, (SparseLowRank, Narrowed)):
        levels = getattr(blocks, f"{side}_levels" if isinstance(blocks, SparseLowRank) else f"{side}s").long()
    return levels.cpu().reshape(count, -1).amax(1)


def _common_order(made: Tensor, read: Tensor) -> Tensor:
    """An order of channels in which the sets of both levels are slices (for two levels each)."""
    top = made == made.max()
    key = (made.max() - made) * 1024 + torch.where(top, read, read.max() - read)
    return key.argsort(stable=True)
