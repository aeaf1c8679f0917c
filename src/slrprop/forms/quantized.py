"""Forms in few bits: whole numbers and scales."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.forms.base import Form, restored

BITS = (4, 8)
CODES = {4: (-8, 7), 8: (-128, 127)}


def packed(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers as uint8 bytes: one each, or two in one byte, the first in its lower half."""
    flat = codes.reshape(-1).to(torch.int8).view(torch.uint8)
    if bits == 8:
        return flat
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[0::2] & 15) | (flat[1::2] << 4)


def unpacked(stored: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The int8 whole numbers that :func:`packed` stored."""
    count = int(torch.Size(shape).numel())
    if stored.dtype != torch.uint8 or stored.ndim != 1 or len(stored) != -(-count * bits // 8):
        raise SlrpropError(f"{count} numbers of {bits} bits take {-(-count * bits // 8)} bytes, got {stored.dtype} {tuple(stored.shape)}")  # fmt: skip
    stored = stored.view(torch.int8)
    if bits == 4:  # the lower half is shifted up, so that it brings its sign along
        stored = torch.stack([stored << 4, stored], 1).reshape(-1)[:count] >> 4
    return stored.reshape(shape)


class _Codes:
    """A form filled with its whole numbers, which are kept as they are stored, and unpacked at each call: a search keeps hundreds."""

    def __get__(self, owner: Any, kind: Any = None) -> Form:
        form: Form = owner.form
        return form.with_matrices(
            {
                name: unpacked(owner.stored[name], owner.bits, tuple(like.shape))
                for name, like in form.matrices().items()
            }
        )


def _of_form(name: str) -> Any:
    """What a form in few bits has of the form that its whole numbers fill."""
    return property(lambda self: getattr(self.form, name))


@dataclass(frozen=True, eq=False)
class Quantized(Form):
    """A form whose matrices are whole numbers times scales.

    Numbers that belong to one rank component (of a dense weight: to one output) share a scale, so neurons can be put in
    any order. ``codes`` is the form filled with whole numbers of ``bits`` bits (int8), ``form`` the same without any; ``scales`` has for every matrix a float16
    vector along its other axis (one number for a vector).
    """

    codes: Form
    scales: dict[str, Tensor]
    bits: int
    form: Form = field(init=False, repr=False)
    stored: dict[str, Tensor] = field(init=False, repr=False)  # :func:`packed`, by the matrices' names
    kind: ClassVar[str] = "quantized"
    shape, faster, selects, numbers, multiplications, indices, read = map(
        _of_form, ("shape", "faster", "selects", "numbers", "multiplications", "indices", "read")
    )

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise SlrpropError(f"quantised factors take 4 or 8 bits a number, got {self.bits!r}")
        codes: Form = vars(self).pop("codes")
        vars(self)["form"] = codes.with_matrices({name: whole.to("meta") for name, whole in codes.matrices().items()})
        vars(self)["stored"] = {name: packed(whole, self.bits) for name, whole in codes.matrices().items()}
        for name, matrix in self.form.matrices().items():
            scale = self.scales.get(name)
            if scale is None or scale.dtype != torch.float16 or scale.shape != self._scale_shape(name, matrix):
                raise SlrpropError(f"matrix '{name}' of shape {tuple(matrix.shape)} takes float16 scales of shape {self._scale_shape(name, matrix)}, got {None if scale is None else tuple(scale.shape)}")  # fmt: skip

    def _scale_shape(self, name: str, matrix: Tensor) -> tuple[int, ...]:
        return (1,) if matrix.ndim == 1 else (matrix.shape[1 - self.form.scale_axes()[name]],)

    def wide_scales(self) -> dict[str, Tensor]:
        """For each matrix its scales, which spread over it."""
        axes = self.form.scale_axes()
        return {
            name: self.scales[name] if matrix.ndim == 1 else self.scales[name].unsqueeze(axes[name])
            for name, matrix in self.form.matrices().items()
        }

    def plain(self) -> Form:
        """The factors as float32 numbers."""
        scales, codes = self.wide_scales(), self.codes.matrices()
        return self.form.with_matrices({name: matrix * scales[name].float() for name, matrix in codes.items()})

    def matrices(self) -> dict[str, Tensor]:
        return {name: matrix.float() for name, matrix in self.codes.matrices().items()}

    def with_matrices(self, matrices: Mapping[str, Tensor]) -> "Quantized":
        return replace(self, codes=self.codes.with_matrices(matrices))

    def arrays(self) -> dict[str, Tensor]:
        """Packed whole numbers, the scales' bits as int16 (so that no change of dtype touches them), and the indices."""
        found = self.stored | {f"{name}_scale": scale.view(torch.int16) for name, scale in self.scales.items()}
        return found | self.form.indices()

    def description(self) -> dict[str, Any]:
        shapes = {name: list(matrix.shape) for name, matrix in self.form.matrices().items()}
        return {"kind": self.kind, "bits": self.bits, "of": self.form.description(), "shapes": shapes}

    @classmethod
    def restored(cls, description: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> "Quantized":
        bits, shapes = description["bits"], description["shapes"]
        if bits not in BITS or not all(
            isinstance(side, int) and side >= 0 for shape in shapes.values() for side in shape
        ):
            raise SlrpropError(f"the shapes or the {bits!r} bits of a quantised layer are no whole numbers in range")
        known = dict(arrays) | {name: unpacked(arrays[name], bits, tuple(shape)) for name, shape in shapes.items()}
        scales = {name: arrays[f"{name}_scale"].view(torch.float16) for name in shapes}
        return cls(restored(description["of"], known), scales, bits)

    def dense(self) -> Tensor:
        return self.plain().dense()

    def permuted(self, rows: Tensor | None = None, columns: Tensor | None = None) -> "Quantized":
        scales, axes, shapes = dict(self.scales), self.form.scale_axes(), self.form.matrices()
        wide_scales = {name: scale.float().expand(shapes[name].shape) for name, scale in self.wide_scales().items()}
        for name, wide in self.form.with_matrices(wide_scales).permuted(rows, columns).matrices().items():
            if wide.ndim == 2 and wide.shape[axes[name]]:  # the scales of outputs follow their outputs
                scales[name] = wide.select(axes[name], 0).half().clone(memory_format=torch.contiguous_format)
        return replace(self, codes=self.codes.permuted(rows, columns), scales=scales)


Quantized.codes = _Codes()  # type: ignore[assignment]
