"""Follow a tensor through one run of a torch network, whatever code its modules are made of."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from slrprop.network.chain import Affine, Element, Linear

_RELU: list[Any] = [torch.relu, torch.relu_, functional.relu, functional.relu_, Tensor.relu, Tensor.relu_]
_TANH: list[Any] = [torch.tanh, torch.tanh_, functional.tanh, Tensor.tanh, Tensor.tanh_]
_SIGMOID: list[Any] = [torch.sigmoid, torch.sigmoid_, functional.sigmoid, Tensor.sigmoid, Tensor.sigmoid_]
_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys(_RELU, "relu"),
    **dict.fromkeys(_TANH, "tanh"),
    **dict.fromkeys(_SIGMOID, "sigmoid"),
}
_SOFTMAX = {torch.softmax, functional.softmax, Tensor.softmax}
_LOG_SOFTMAX = {torch.log_softmax, functional.log_softmax, Tensor.log_softmax}
_DROPOUT = {functional.dropout, functional.alpha_dropout, torch.dropout}
_SAME = {
    torch.flatten,
    Tensor.flatten,
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
    Tensor.contiguous,
    Tensor.squeeze,
    torch.squeeze,
}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (tuple, list)) else []


class _Call:
    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.function, self.args, self.kwargs, self.result = function, args, kwargs, result
        self.reads = {id(tensor) for tensor in _tensors(args) + _tensors(kwargs)}

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


class Trace(TorchFunctionMode):
    """Records every torch call that gives a tensor; tensors are kept, so that their ids stay unique."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _tensors(result):
            self.calls.append(_Call(func, args, kwargs or {}, result))
        return result

    def linear_calls(self, weight: Tensor) -> list[int]:
        """Positions of the dense products with this weight."""
        return [
            i
            for i, call in enumerate(self.calls)
            if call.function is functional.linear and call.argument(1, "weight") is weight
        ]

    def ending(self, output: Tensor) -> str | None:
        """``softmax`` or ``log_softmax`` where that is what made the network's output."""
        last = next((call for call in reversed(self.calls) if call.result is output), None)
        if last is None:
            return None
        return "softmax" if last.function in _SOFTMAX else "log_softmax" if last.function in _LOG_SOFTMAX else None

    def follow(self, start: int, output: Tensor, names: dict[int, str]) -> tuple[list[Element], bool]:
        """What happens to the result of call ``start``, as long as it is element-wise or dense and its only use.

        Args:
            output: the network's output.
            names: dense layers by ``id`` of their weight.

        Returns:
            The elements, and whether they end at the network's output (a final softmax is left out).
        """
        elements: list[Element] = []
        here, tensor = start, self.calls[start].result
        while True:
            users = [i for i in range(here + 1, len(self.calls)) if id(tensor) in self.calls[i].reads]
            if not users:
                return elements, tensor is output
            call = self.calls[users[0]]
            in_place = call.result is tensor
            if (
                (len(users) > 1 and not in_place)
                or not isinstance(call.result, Tensor)
                or call.argument(0, "input") is not tensor
            ):
                return elements, False
            if tensor is output and not in_place:
                return elements, False
            if (call.function in _SOFTMAX or call.function in _LOG_SOFTMAX) and call.result is output:
                last_axis = call.argument(1, "dim") in (-1, tensor.ndim - 1)
                return elements, last_axis
            element = _element(call, tensor, names)
            if element is None:
                return elements, False
            elements += [element] if element != "same" else []
            here, tensor = users[0], call.result


def _element(call: _Call, tensor: Tensor, names: dict[int, str]) -> Element | None:
    """The call as an element, ``"same"`` where it changes nothing, None where it is neither."""
    function = call.function
    if function in _ACTIVATIONS:
        return _ACTIVATIONS[function]
    if function is functional.gelu:
        return "gelu" if call.argument(1, "approximate", "none") == "none" else "gelu_tanh"
    if function in _DROPOUT and not call.argument(2, "training", True):
        return "same"
    if function in _SAME and call.result.shape == tensor.shape:
        return "same"
    if function is functional.linear:
        weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
        zero = weight.new_zeros(weight.shape[0])
        return Linear(weight.detach().T, zero if bias is None else bias.detach(), names.get(id(weight)))
    if function is functional.batch_norm and tensor.ndim == 2 and not call.argument(5, "training", False):
        mean, var = call.argument(1, "running_mean"), call.argument(2, "running_var")
        weight, bias = call.argument(3, "weight"), call.argument(4, "bias")
        scale = (var + call.argument(7, "eps", 1e-5)).rsqrt() * (1 if weight is None else weight.detach())
        return Affine(scale, (0 if bias is None else bias.detach()) - mean * scale)
    return None


def dense_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The ``nn.Linear`` modules whose own forward computes the product, by name, each module once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    }
