"""The torch module that computes with a form, in the place of a layer.

It takes and gives what the layer did, can be fine-tuned, and is exported to ONNX as standard nodes.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from slrprop.forms import Bias, Dense, Fit, Form, Quantized, restored
from slrprop.operators import Convolution, Lookup, MatMul, Operator

_MATMUL = MatMul()
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_placed: ContextVar[Callable[["FactoredLayer", Tensor], Tensor] | None] = ContextVar("placed", default=None)


def keep_factored(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Do nothing: torch's fused paths read ``weight``, unless a hook hangs on one of their modules."""


@contextmanager
def in_place_of_layers(compute: Callable[["FactoredLayer", Tensor], Tensor]) -> Iterator[None]:
    """Let something else say what factored layers make of an input, as an exporter does that writes their nodes itself."""
    token = _placed.set(compute)
    try:
        yield
    finally:
        _placed.reset(token)


class FactoredLayer(nn.Module):
    """A layer held as a fit: its form's matrices and its bias are parameters, index arrays buffers (see :func:`attribute_of`).

    What is stored in few bits is not trained, a change of the module's dtype does not touch it, and it is unpacked when it is first needed.
    """

    like: Tensor
    exported_as: int = 0

    def __init__(self, fit: Fit, operator: Operator = _MATMUL) -> None:
        super().__init__()
        form, bias = fit.form, fit.bias
        self.operator, self._description = operator, form.description()
        self.shape = form.shape
        self.in_features, self.out_features = form.shape[0] // operator.unit, form.shape[1]
        learns = not isinstance(form, Quantized)
        matrices = form.matrices() if learns else {}
        few = bias is not None and bias.scale is not None and not learns
        self.bias = None if bias is None or few else _parameter(bias.value)
        stored = fit.arrays() if few else form.arrays()
        for name, array in stored.items():
            if name in matrices:
                self.register_parameter(attribute_of(name), _parameter(array))
            else:
                self.register_buffer(attribute_of(name), array.clone())
        # in lists: no part of the module's state
        self._names, self._matrices = tuple(stored), tuple(matrices)
        self._known = [_shapes_of(form)] if learns else list[Form]()
        self._arrays = [] if learns else [self.get_buffer(attribute_of(name)) for name in self._names]
        # of what type numbers are where no input says so
        self.register_buffer("like", torch.empty(0), persistent=False)
        self._unpacked: list[tuple[Any, Form, Tensor | None]] = []
        self.register_forward_pre_hook(keep_factored)

    def factors(self) -> Form:
        """The form as it is now."""
        if self._known:
            return self._known[0].with_matrices(
                {name: self.get_parameter(attribute_of(name)) for name in self._matrices}
            )
        return restored(self._description, dict(zip(self._names, self._arrays, strict=True)))

    def fit(self) -> Fit:
        """The form and the bias as they are now."""
        if self.bias is not None:
            return Fit(self.factors(), Bias(self.bias))
        return Fit(self.factors(), Bias.restored(dict(zip(self._names, self._arrays, strict=False)), self.shape[1]))

    @property
    def weight(self) -> Tensor:
        """The weight as torch stores it, multiplied out at each call: for code that reads it."""
        return self.operator.stored(self.factors().dense())

    def forward(self, x: Tensor) -> Tensor:
        compute = _placed.get()
        return self.compute(x) if compute is None else compute(self, x)

    def compute(self, x: Tensor) -> Tensor:
        """What the layer makes of an input."""
        if self._known:
            return self.operator.compute(self.factors(), self.bias, x)
        key = (x.dtype if x.is_floating_point() else self.like.dtype, x.device)
        if not self._unpacked or self._unpacked[0][0] != key:
            with ThreadPoolExecutor(1) as elsewhere:  # where nothing is traced: exported programs hold it as constants
                self._unpacked[:] = [(key, *elsewhere.submit(self._plain, *key).result())]
        _, form, bias = self._unpacked[0]
        return self.operator.compute(form, bias if self.bias is None else self.bias, x)

    @torch.no_grad()
    def _plain(self, dtype: torch.dtype, device: torch.device) -> tuple[Form, Tensor | None]:
        fit = self.fit()
        assert isinstance(fit.form, Quantized)
        plain = fit.form.plain()
        plain = plain.with_matrices({name: value.to(device, dtype) for name, value in plain.matrices().items()})
        return plain, None if fit.bias is None else fit.bias.value.to(device, dtype)

    def _apply(self, *args: Any, **kwargs: Any) -> "FactoredLayer":
        super()._apply(*args, **kwargs)
        self._refresh()
        return self

    def _refresh(self) -> None:
        self._unpacked.clear()
        if not self._known:
            self._arrays[:] = [self.get_buffer(attribute_of(name)) for name in self._names]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()
        if self._known:
            arrays = {name: getattr(self, attribute_of(name)).detach() for name in self._names}
            self._known[:] = [_shapes_of(restored(self._description, arrays))]

    def extra_repr(self) -> str:
        return f"{self._description['kind']}, in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def attribute_of(array: str) -> str:
    """What a module calls an array of its form: its ``weight`` is another."""
    return "matrix" if array == "weight" else array


def _parameter(block: Tensor) -> nn.Parameter:
    return nn.Parameter(block.detach().clone(memory_format=torch.contiguous_format))


def _shapes_of(form: Form) -> Form:
    """The form with its index arrays and no numbers."""
    return form.with_matrices({name: matrix.to("meta") for name, matrix in form.matrices().items()})


def layer_from(fit: Fit, operator: Operator = _MATMUL) -> nn.Module:
    """The module that computes with a fit; without a bias it adds none. A dense weight becomes torch's own module."""
    form, bias = fit.form, fit.bias
    if not isinstance(form, Dense):
        return FactoredLayer(fit, operator)
    (m, n), has_bias = form.shape, bias is not None
    made: nn.Module
    if isinstance(operator, Lookup):
        return nn.Embedding.from_pretrained(form.weight.detach().clone(), freeze=False)
    if isinstance(operator, MatMul):
        made = nn.utils.skip_init(nn.Linear, m, n, bias=has_bias)
    elif isinstance(operator, Convolution) and all(before == behind for before, behind in operator.padding) and not operator.transposed:  # fmt: skip
        sides = {"stride": operator.stride, "padding": tuple(before for before, _ in operator.padding), "dilation": operator.dilation}  # fmt: skip
        kind, channels = CONVOLUTIONS[len(operator.kernel)], m // operator.unit * operator.groups
        made = nn.utils.skip_init(kind, channels, n, operator.kernel, groups=operator.groups, bias=has_bias, **sides)
    else:
        return FactoredLayer(fit, operator)
    made.weight = _parameter(operator.stored(form.weight))
    if bias is not None:
        made.bias = _parameter(bias.value)
    return made


def note_shape(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Note that a layer took the place of one of another shape (m, n), before neurons around it were removed."""
    module.original_shape = shape[0], shape[1]  # type: ignore[assignment]


def original_shape(module: nn.Module) -> tuple[int, int] | None:
    """The shape (m, n) of the layer before neurons around it were removed; None where none were."""
    return getattr(module, "original_shape", None)
