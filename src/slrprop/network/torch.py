"""Torch networks: find dense layers, stream what flows through them, swap them."""

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slrprop.checks import suggestion
from slrprop.data import Batch, Data
from slrprop.errors import SlrpropError, first_line
from slrprop.factors import Dense
from slrprop.layers import linear_from
from slrprop.losses import rows_of
from slrprop.network.chain import ACTIVATIONS, Affine, Chain, Element, Linear, fold
from slrprop.network.trace import Path, Trace, dense_modules


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def main_output(result: Any) -> Tensor:
    """The tensor that quality is judged by: the result itself, its ``logits``, or its first tensor."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping) or hasattr(result, "logits"):
        result = (
            result["logits"]
            if isinstance(result, Mapping) and "logits" in result
            else getattr(result, "logits", result)
        )
        return main_output(next(iter(result.values())) if isinstance(result, Mapping) else result)
    if isinstance(result, (tuple, list)) and result:
        return main_output(result[0])
    raise SlrpropError(
        f"the model returned {type(result).__name__}; slrprop needs a tensor, or a tuple or mapping that starts with one"
    )


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer (the CPU if it has neither)."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def fingerprint(weight: Tensor) -> str:
    """SHA-256 of shape, dtype and values."""
    array = weight.detach().cpu().contiguous()
    head = f"{tuple(array.shape)} {array.dtype}".encode()
    return hashlib.sha256(head + array.view(torch.uint8).numpy().tobytes()).hexdigest()


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """For every dense layer, the other modules' parameters that are the same tensor as its weight."""
    owners: dict[int, list[tuple[str, int]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter.data_ptr(), []).append((f"{path}.{key}", id(module)))
    return {
        name: [place for place, owner in owners.get(module.weight.data_ptr(), []) if owner != id(module)]
        for name, module in dense_modules(model).items()
    }


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def swapped(model: nn.Module, modules: dict[str, nn.Module]) -> nn.Module:
    """A deep copy of the model with the named modules, with the old ones' hooks, in the place of the old ones."""
    memo: dict[int, Any] = {}
    for name, new in modules.items():
        old = model.get_submodule(name)
        new.train(old.training)
        for hooks in _HOOKS:
            getattr(new, hooks).update(getattr(old, hooks))
        memo[id(old)] = new.to(device_of(old))
    return copy.deepcopy(model, memo)


class Flow(NamedTuple):
    """One batch through the network: its main output, and per layer the inputs and outputs of each call, flattened to (p, m) and (p, n)."""

    batch: Batch
    output: Tensor
    calls: dict[str, list[tuple[Tensor, Tensor]]]


class TorchNetwork:
    """A torch model and one traced batch of data."""

    def __init__(self, model: nn.Module, data: Data | None) -> None:
        self.model = model
        self.modules = dense_modules(model)
        self.tied = tied_names(model)
        self.device = device_of(model)
        self.ending: str | None = None
        self.order = tuple(self.modules)
        self.times_called = dict.fromkeys(self.modules, 1)
        self._paths: dict[str, Path] = {}
        self._chains: dict[str, Chain | None] = {}
        for name, module in self.modules.items():
            if not torch.isfinite(module.weight).all() or not (
                module.bias is None or torch.isfinite(module.bias).all()
            ):
                raise SlrpropError(
                    f"layer '{name}' {tuple(module.weight.T.shape)} holds NaN or infinite weights; repair the model first"
                )
        if data is not None:
            self._follow(data)

    def _follow(self, data: Data) -> None:
        """Trace the first batch: in which order layers are called, and what follows each."""
        trace = Trace()
        handles = trace.watch(self.modules)
        try:
            with evaluating(self.model):
                batch = next(iter(data)).to(self.device)
                with trace:
                    result = self.call(batch)
        finally:
            for handle in handles:
                handle.remove()
        output, made = main_output(result), trace.made
        self.ending = trace.ending(output)
        for name, module in self.modules.items():
            # a product outside the modules' own forward reads a weight: such a layer can't be replaced
            own = sum(len(made[other]) for other, twin in self.modules.items() if twin.weight is module.weight)
            self.times_called[name] = len(made[name]) if trace.reads(module) <= own else 0
        self.order = tuple(sorted((name for name in made if self.times_called[name]), key=lambda name: made[name][0]))
        for name in self.order:
            if len(made[name]) == 1:
                start = made[name][0]
                self._paths[name] = path = trace.follow(start, result, output)
                self._chains[name] = fold(path.elements, rows_of(trace.calls[start].result)[0]) if path.whole else None

    def reproduces(self, chain: Chain, y: Tensor, output: Tensor) -> bool:
        """Whether the chain after a layer turns its output y (p x n) into the network's output, on this batch."""
        got, want = chain.values(rows_of(y))[-1], rows_of(output)
        if self.ending:
            got, want = got.log_softmax(-1), self.scores(want).log_softmax(-1)
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(y.dtype, 3e-2)
        return got.shape == want.shape and torch.allclose(got, want, rtol=tolerance, atol=tolerance)

    def call(self, batch: Batch) -> Any:
        """The model's result for a batch (use inside :func:`evaluating`).

        Raises:
            SlrpropError: the model refuses the batch, for example for its shape.
        """
        try:
            return self.model(*batch.inputs, **batch.named)
        except Exception as error:  # somebody else's forward: it may raise anything
            shapes = [tuple(x.shape) for x in (*batch.inputs, *batch.named.values()) if isinstance(x, Tensor)]
            raise SlrpropError(
                f"the model can't take data of shape {', '.join(map(str, shapes))}: {first_line(error)}"
            ) from error

    def scores(self, output: Tensor) -> Tensor:
        """The network's output as class scores (logits), also where it ends in a softmax."""
        return output.clamp_min(torch.finfo(output.dtype).tiny).log() if self.ending == "softmax" else output

    def require(self, name: str) -> None:
        """Refuse a name that is no dense layer, or one the data never reaches."""
        if name not in self.modules:
            raise SlrpropError(
                f"no dense layer is called '{name}'{suggestion(str(name), self.modules)}; the model has {', '.join(self.modules) or 'none'}"
            )
        if not self.times_called[name]:
            raise SlrpropError(
                f"layer '{name}' is not called as a module on this data (a fused path may read its weight), so it can't be replaced"
            )

    def weight(self, name: str) -> Tensor:
        """The layer's weight in the articles' orientation, m x n (inputs x outputs)."""
        return self.modules[name].weight.detach().T.contiguous()

    def bias(self, name: str) -> Tensor | None:
        """The layer's bias (n,)."""
        bias = self.modules[name].bias
        return None if bias is None else bias.detach()

    def chain(self, name: str) -> Chain | None:
        """What followed a layer on the first batch, where that is a chain of dense layers up to the network's output."""
        return self._chains.get(name)

    def next_layer(self, name: str) -> str | None:
        """The dense layer that takes this one's output through element-wise functions and batch norm only."""
        return next((element.name for element in self._elements(name) if isinstance(element, Linear)), None)

    def feeds_directly(self, name: str) -> str | None:
        """Like :meth:`next_layer`, where nothing between tells features apart (no batch norm) or reads them."""
        between = itertools.takewhile(lambda element: not isinstance(element, Linear), self._elements(name))
        if name not in self._paths or not self._paths[name].private or any(isinstance(e, Affine) for e in between):
            return None
        return self.next_layer(name)

    def is_last(self, name: str) -> bool:
        """Whether the network's output is this layer's output, element-wise functions and a final softmax aside."""
        return name in self._paths and self._paths[name].whole and self.next_layer(name) is None

    def activated(self, name: str, y: Tensor) -> Tensor:
        """A layer's output (p x n) after the batch norm and activation that follow it."""
        for element in self._elements(name):
            if isinstance(element, Linear):
                break
            if isinstance(element, Affine):
                y = y * element.scale + element.shift
            else:
                return ACTIVATIONS[element](y)
        return y

    def _elements(self, name: str) -> list[Element]:
        return self._paths[name].elements if name in self._paths else []

    def stream(self, names: tuple[str, ...], data: Data) -> Iterator[Flow]:
        """Run the data through the network batch by batch, with what the named layers saw."""
        for batch in data:
            calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

            def note(name: str, into: dict[str, list[tuple[Tensor, Tensor]]]) -> Callable[..., None]:
                def hook(module: nn.Linear, inputs: tuple[Tensor, ...], y: Tensor) -> None:
                    into[name].append((inputs[0].reshape(-1, module.in_features), y.reshape(-1, module.out_features)))

                return hook

            batch = batch.to(self.device)
            handles = [self.modules[name].register_forward_hook(note(name, calls), prepend=True) for name in names]
            try:
                with evaluating(self.model):
                    output = main_output(self.call(batch))
            finally:
                for handle in handles:
                    handle.remove()
            if not torch.isfinite(output).all():
                raise SlrpropError(
                    "the network's output holds NaN or infinite values on this data; repair the model or the data first"
                )
            yield Flow(batch, output, calls)

    def outputs_with(self, name: str, batch: Batch, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The network's output when the named layer gives ``change(its input)`` instead of its own output."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return change(inputs[0])

        handle = self.modules[name].register_forward_hook(hook, prepend=True)
        try:
            with evaluating(self.model):
                return main_output(self.model(*batch.inputs, **batch.named))
        finally:
            handle.remove()

    def with_weights(self, weights: dict[str, Tensor], data: Data) -> "TorchNetwork":
        """A copy of the network whose named layers have these dense weights (m x n)."""
        modules = {
            name: linear_from(Dense(weight), self.bias(name)).to(self.modules[name].weight.dtype)
            for name, weight in weights.items()
        }
        return TorchNetwork(swapped(self.model, modules), data)
