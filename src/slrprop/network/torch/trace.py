"""Follow a tensor through one run of a torch network, whatever code its modules are made of."""

import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from slrprop.network.chain import Affine, Element, Linear, Path, Walk

PLAIN = (Tensor, nn.Parameter)
# by the names of functions, which torch, torch.nn.functional and Tensor share
_CONVOLUTIONS = {f"conv{kind}{axes}d" for kind in ("", "_transpose") for axes in (1, 2, 3)}
_POOLING = {f"{kind}_pool{axes}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for axes in (1, 2, 3)}
_SIZED = {"view", "reshape", "squeeze"}  # may name a size, or need one
_SAME = {"flatten", "contiguous", *_SIZED}
_ALONE = {
    "leaky_relu", "elu", "selu", "celu", "silu", "mish", "hardtanh", "relu6", "hardswish", "hardsigmoid", "softplus", "softsign",
    "log_sigmoid", "clamp", "abs", "neg", "exp", "square", "add", "sub", "mul", "div", "pow",
}  # fmt: skip


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (tuple, list)) else []


class _Call:
    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.name, self.args, self.kwargs, self.result = name_of(function), args, kwargs, result
        self.reads = {id(tensor) for tensor in _tensors(args) + _tensors(kwargs)}

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


def name_of(function: Any) -> str:
    """What a function is called, whether it is a method or not and whether it works in place or not."""
    if function is torch.batch_norm:
        return "torch.batch_norm"  # which takes what the other one does in another order
    return str(getattr(function, "__name__", function)).removeprefix("__").rstrip("_")


def feature_axis(function: Any, args: tuple[Any, ...]) -> int | None:
    """On which axis of its result a product has its units; None for other functions."""
    name = name_of(function)
    if name in _CONVOLUTIONS:
        return 1
    return {"linear": -1, "matmul": -2 if isinstance(args[0], nn.Parameter) else -1}.get(name)  # weight @ x


class Trace(TorchFunctionMode):
    """Records every torch call that gives a tensor; tensors are kept, so that their ids stay unique.

    ``products`` has the numbers of units and of all numbers of each product.

    Args:
        place, unit: raise this unit of the ``place``-th product (from 1) far above all others.
    """

    def __init__(self, place: int = 0, unit: int = 0) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.products: list[tuple[int, int]] = []
        self._place, self._unit = place, unit

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        axis = feature_axis(func, args)
        if axis is not None and isinstance(result, Tensor) and result.ndim > max(axis, -1 - axis):
            self.products.append((result.shape[axis], result.numel()))
            if len(self.products) == self._place:
                result.select(axis, self._unit).add_(10 * (1 + result.abs().max()))
        if _tensors(result):
            self.calls.append(_Call(func, args, kwargs or {}, result))
        return result

    def watch(self, modules: Mapping[str, nn.Module]) -> list[RemovableHandle]:
        """Note which products these modules make; the handles undo it."""
        self.made: dict[str, list[int]] = {name: [] for name in modules}
        # the tensor that a layer reads first, and how often that had been written to
        self.read: dict[str, tuple[int, int]] = {}

        def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            self.made[name].append(len(self.calls) - 1)  # the product is the last call of the module's own forward
            if inputs and not inputs[0].is_inference():  # those do not count what is written to them
                self.read.setdefault(name, (id(inputs[0]), inputs[0]._version))

        return [module.register_forward_hook(partial(note, name), prepend=True) for name, module in modules.items()]

    def reads(self, weight: Tensor) -> int:
        """How many products read a weight (of one that a hook computes at each call, the last)."""
        products = (call for call in self.calls if call.name in {"linear", "embedding", *_CONVOLUTIONS})
        return sum(call.argument(1, "weight") is weight for call in products)

    def ending(self, output: Tensor) -> str | None:
        """``softmax`` or ``log_softmax`` where that is what made the network's output."""
        last = next((call for call in reversed(self.calls) if call.result is output), None)
        return last.name if last is not None and last.name in ("softmax", "log_softmax") else None

    def norms(self, modules: Mapping[str, nn.Module]) -> dict[int, str]:
        """The names of these batch norms that are called once, by the ids of their means."""
        means = [id(call.argument(1, "running_mean")) for call in self.calls if call.name == "batch_norm"]
        return {key: name for name, module in modules.items() if means.count(key := id(module.running_mean)) == 1}

    def follow(self, start: int, result: Any, output: Tensor, norms: Mapping[int, str]) -> Path:
        """What happens to the result of call ``start``, as long as each channel goes its own way, or is read by a layer, and has no other use.

        Args:
            result: everything the network returned; a tensor in there is used by the caller.
            output: the main output among it.
            norms: see :meth:`norms`.
        """
        names = {position: name for name, positions in self.made.items() for position in positions}
        attributes = vars(result) if hasattr(result, "__dict__") else {}
        returned = {id(tensor) for tensor in [*_tensors(result), *_tensors(attributes)]}
        here, tensor, maps = start, self.calls[start].result, self.calls[start].name in _CONVOLUTIONS
        if maps and tensor.ndim != self.calls[start].argument(1, "weight").ndim:
            return Path([], False, "its maps have no axis of samples")
        walk = Walk(tensor.shape[1 if maps else -1] if tensor.ndim else 0, maps)
        while not walk.ended:
            users = [i for i in range(here + 1, len(self.calls)) if id(tensor) in self.calls[i].reads]
            if not users:
                return walk.end(tensor is output)
            if id(tensor) in returned:
                walk.hold("the network returns what it makes")
            call = self.calls[users[0]]
            told = f"'{call.name}' stands behind it"
            if len(users) > 1 and call.result is not tensor:
                return walk.end(False, f"what it makes has {len(users)} uses")
            if not isinstance(call.result, Tensor) or call.argument(0, "input") is not tensor:
                return walk.end(False, told)
            if call.name in ("softmax", "log_softmax") and call.result is output:
                return walk.end(call.argument(1, "dim") in (-1, tensor.ndim - 1))
            element = _element(call, tensor, names.get(users[0]), walk, norms)
            if element is None:
                return walk.end(False, told)
            sides = call.args[1] if call.args[1:] and isinstance(call.args[1], (tuple, list)) else call.args[1:]
            if call.name in _SIZED and (call.name == "squeeze" or sides[-1:] not in ((-1,), [-1])):
                walk.hold(f"'{call.name}' behind it says how many channels there are")
            walk.take(element)
            walk.maps = walk.maps and call.result.ndim > 2
            here, tensor = users[0], call.result
        return walk.end(False)


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make: of all, and of those that are still ``alive``; what is ``given`` counts nothing."""

    def __init__(self, given: Iterable[Any]) -> None:
        super().__init__()
        self.bytes = self.alive = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in given if type(tensor) in PLAIN}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage() if type(tensor) in PLAIN else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.bytes, self.alive = self.bytes + storage.nbytes(), self.alive + storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _element(call: _Call, tensor: Tensor, name: str | None, walk: Walk, norms: Mapping[int, str]) -> Element | None:
    """The call as an element, ``"same"`` where it changes nothing, None where it is neither."""
    function, maps, shape = call.name, walk.maps, call.result.shape
    if maps and (function in _POOLING or function in _SAME or function == "mean"):
        axes = call.argument(1, "dim") if function == "mean" else 2
        axes = axes if isinstance(axes, (tuple, list)) else (axes,)
        over = all(isinstance(axis, int) and axis % tensor.ndim > 1 for axis in axes) and len(axes) > 0
        laid = len(shape) == 2 and shape[0] == len(tensor) and shape[1] % walk.width == 0
        kind = "same" if function in _SAME else function
        return kind if over and (laid or shape[:2] == tensor.shape[:2]) else None
    if function in ("relu", "tanh", "sigmoid"):
        return function
    if function == "gelu":
        return "gelu" if call.argument(1, "approximate", "none") == "none" else "gelu_tanh"
    if function in ("dropout", "alpha_dropout") and not call.argument(2, "training", True):
        return "same"
    if function in _SAME and shape == tensor.shape:
        return "same"
    if (function in _CONVOLUTIONS and name) if maps else function == "linear":
        weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
        zero = weight.new_zeros(weight.shape[0])
        return Linear(weight.detach().flatten(1).T, zero if bias is None else bias.detach(), name)
    if function in _ALONE and call.reads == {id(tensor)}:
        return function
    if function == "batch_norm" and (maps or tensor.ndim == 2) and not call.argument(5, "training", False):
        mean, var = call.argument(1, "running_mean"), call.argument(2, "running_var")
        weight, bias, eps = call.argument(3, "weight"), call.argument(4, "bias"), call.argument(7, "eps", 1e-5)
        own = not walk.stop and mean.numel() == walk.width
        return Affine.of(mean, var, eps, weight, bias, norms.get(id(mean)) if own else None)
    return None
