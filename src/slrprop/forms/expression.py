"""What each form computes, written once: for torch tensors and for the nodes of a file, for products and for convolutions."""

from functools import singledispatch
from typing import Any

import torch

from slrprop.errors import SlrpropError
from slrprop.forms.base import Dense, Form, LowRank
from slrprop.forms.blocks import SparseLowRank
from slrprop.forms.narrowed import Narrowed
from slrprop.forms.quantized import Quantized
from slrprop.forms.shared import Shared
from slrprop.forms.sparse import LowRankPlusSparse, Sparse
from slrprop.forms.spatial import Spatial, Tucker


@singledispatch
def express(form: Form, to: Any, x: Any) -> Any:
    """What a form makes of an input, without the bias. A new form registers its own.

    Args:
        to: what puts the expression together: an :class:`slrprop.operators.Operator` of tensors, or what does the same with the
            names of a file's tensors (:class:`slrprop.network.onnx.writer.Writer`).
    """
    raise SlrpropError(f"nothing computes with {type(form).__name__} forms")


@express.register
def _(form: Dense, to: Any, x: Any) -> Any:
    return to.enter(x, to.number(form.weight, "weight"))


@express.register
def _(form: LowRank, to: Any, x: Any) -> Any:
    return to.product(to.enter(x, to.number(form.left, "left")), to.number(form.right, "right"))


@express.register
def _(form: Spatial, to: Any, x: Any) -> Any:
    h = to.along(0).enter(x, to.number(form.first, "first"))
    return to.along(1).enter(h, to.number(form.second, "second"))


@express.register
def _(form: Tucker, to: Any, x: Any) -> Any:
    h = to.enter(to.product(x, to.number(form.first, "first")), to.number(form.core, "core"))
    return to.product(h, to.number(form.last, "last"))


@express.register
def _(form: SparseLowRank, to: Any, x: Any) -> Any:
    if (y := to.merged(form, x)) is not None:
        return y
    sets, parts = form.sets, []
    hidden = {
        level: to.enter(to.some(x, sets.rows[level]), to.number(left, f"left_{level}"))
        for level, left in enumerate(form.left)
        if left.shape[1] or not level
    }
    for columns, places in sets.pieces:
        stacked = [place.taken(block, 1) for place, block in zip(places, form.right, strict=False)]
        if stacked:
            right = to.number(torch.cat(stacked), *(f"right_{level}" for level in range(len(stacked))))
            parts.append(to.product(to.join([h for level, h in hidden.items() if level < len(stacked)]), right))
        else:
            parts.append(to.nothing(hidden[0], len(columns)))
    y = to.join(parts)
    return y if sets.order is None else to.pick(y, sets.order)


@express.register
def _(form: Narrowed, to: Any, x: Any) -> Any:
    read, places = form.sides
    y = to.enter(to.some(x, read), to.number(form.block, "block"))
    return y if places is None else to.pick(to.join([y, to.nothing(y, 1)]), places)


@express.register(Sparse)
@express.register(Shared)
def _(form: Form, to: Any, x: Any) -> Any:
    return to.enter(x, to.together(form))


@express.register
def _(form: LowRankPlusSparse, to: Any, x: Any) -> Any:
    return to.add_up(express(form.low_rank, to, x), express(form.sparse, to, x))


@express.register
def _(form: Quantized, to: Any, x: Any) -> Any:
    builder, plain = to.opened(form)
    return express(plain, builder, x)
