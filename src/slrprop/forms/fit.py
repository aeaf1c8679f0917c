"""What a layer is given: a form in the place of its weight, and a bias."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.forms.base import Dense, Form
from slrprop.forms.quantized import packed, unpacked


@dataclass(frozen=True, eq=False)
class Bias:
    """A layer's bias (n,): real numbers; or whole numbers of eight bits (float32) and their ``scale``, float16 (1,)."""

    numbers: Tensor
    scale: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """As real numbers (n,)."""
        return self.numbers if self.scale is None else self.numbers * self.scale.float()

    def taken(self, order: Tensor) -> "Bias":
        """The bias of some outputs, in their order."""
        return replace(self, numbers=self.numbers[order])

    def arrays(self) -> dict[str, Tensor]:
        """Everything stored, by name; the scale's bits as int16, so that no change of dtype touches them."""
        if self.scale is None:
            return {"new_bias": self.numbers}
        return {"bias_codes": packed(self.numbers, 8), "bias_scale": self.scale.view(torch.int16)}

    @classmethod
    def restored(cls, arrays: Mapping[str, Tensor], count: int) -> "Bias | None":
        """The bias of ``count`` outputs among a layer's stored arrays, if there is one.

        Raises:
            SlrpropError: it is of another size.
        """
        bias = None
        if "new_bias" in arrays:
            bias = cls(arrays["new_bias"])
        elif "bias_codes" in arrays and "bias_scale" in arrays:
            codes, scale = arrays["bias_codes"], arrays["bias_scale"]
            bias = cls(unpacked(codes, 8, tuple(codes.shape)).float(), scale.view(torch.float16))
        if bias is not None and (
            bias.numbers.shape != (count,) or (bias.scale is not None and bias.scale.shape != (1,))
        ):
            raise SlrpropError(f"the bias takes a number for each of {count} outputs, in few bits also one scale; the stored arrays hold {tuple(bias.numbers.shape)}")  # fmt: skip
        return bias


@dataclass(frozen=True, eq=False)
class Fit:
    """A form (m x n) for a layer, its new bias if that changes (None: the layer's own stays), and what else there is to report."""

    form: Form
    bias: Bias | None = None
    notes: dict[str, float] = field(default_factory=dict)

    def over(self, own: Tensor | None) -> "Fit":
        """The same with the layer's own bias where no new one is given."""
        return self if self.bias is not None or own is None else replace(self, bias=Bias(own))

    def multiplied(self) -> "Fit":
        """The same as a dense weight and a bias of real numbers."""
        return Fit(Dense(self.form.dense()), None if self.bias is None else Bias(self.bias.value))

    def arrays(self) -> dict[str, Tensor]:
        """Everything stored, by name."""
        return self.form.arrays() | ({} if self.bias is None else self.bias.arrays())

    def bytes(self, itemsize: int) -> int:
        """Bytes of everything stored, with real numbers of ``itemsize`` bytes."""
        arrays = self.arrays().values()
        return sum(array.numel() * (itemsize if array.is_floating_point() else array.itemsize) for array in arrays)
