"""What a model holds: its layers, what else holds numbers, and whether it is compressed already."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Union

from slrprop import network
from slrprop.errors import SlrpropWarning, printable
from slrprop.network.onnx.census import forms_of, is_own
from slrprop.network.onnx.file import OnnxFile

if TYPE_CHECKING:
    from torch import nn

Model = Union["nn.Module", str, Path]


@dataclass(frozen=True)
class LayerInfo:
    """A layer, its weight as a matrix: ``shape`` (m, n) inputs x outputs, its weight's ``numbers``, their ``share`` of the bytes of all.

    ``break_even_rank`` is the highest rank at which a low-rank form stores fewer numbers (0: none does).
    ``tied_to`` names parameters elsewhere that are the same tensor.
    """

    name: str
    shape: tuple[int, int]
    numbers: int
    share: float
    break_even_rank: int
    tied_to: tuple[str, ...] = ()


class Inspection(list[LayerInfo]):
    """Layers; ``other`` says in words which kinds of module or node use the other numbers, those of 1 % of all and more."""

    other: str

    def __str__(self) -> str:
        other = f"other numbers, by what uses them: {self.other}" if self.other else ""
        return "\n".join([*map(str, self), *filter(None, [other])])


def inspect(model: Model) -> Inspection:
    """The layers of a torch module or an ONNX file, in the order of its modules or nodes, and what else holds numbers."""
    found = Inspection()
    # of a file the graph alone: it needs no torch, which takes seconds to load
    holds = OnnxFile.open(model).graph if isinstance(model, (str, Path)) else network.open_network(model, None)
    warn_if_compressed(model)
    total, found.other = max(1, holds.number_bytes), holds.other_numbers()
    for name in holds.names:
        m, n = holds.shape(name)
        tied = holds.layers[name].tied
        share = m * n * holds.itemsize(name) / total
        found.append(LayerInfo(name, (m, n), m * n, share, (m * n - 1) // (m + n), tied))
    return found


def warn_if_compressed(model: Model | OnnxFile) -> None:
    """Say it where a model's layers are compressed already."""
    if isinstance(model, (str, Path, OnnxFile)):
        proto = (model if isinstance(model, OnnxFile) else OnnxFile.open(model)).proto
        found, own = forms_of(proto.graph), is_own(proto.graph)
    elif not hasattr(model, "named_modules"):
        return  # what it is will be told where it is opened
    else:
        from slrprop.network.torch.modules import FactoredLayer

        found = {name: part.factors().kind for name, part in model.named_modules() if isinstance(part, FactoredLayer)}
        own = bool(found)
    if own or any("bits" in form for form in found.values()):
        by = "by slrprop: give the original" if own else "by another tool: give the model of before"
        told = "; ".join(f"{name}: {form}" for name, form in found.items()) or "in real numbers"
        warnings.warn(printable(f"layers are compressed already {by} instead ({told})"), SlrpropWarning, stacklevel=3)
