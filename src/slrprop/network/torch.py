"""Torch networks: find dense layers, stream what flows through them, swap them."""

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slrprop.data import Batch, Data
from slrprop.errors import SlrpropError, first_line
from slrprop.factors import Dense
from slrprop.layers import linear_from
from slrprop.losses import rows_of
from slrprop.network.base import Flow, Layer, Network, directions, gradients_along, require_finite
from slrprop.network.chain import fold
from slrprop.network.trace import Trace, dense_modules


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


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient; afterwards those do again that did."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_()


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


def stored_numbers(model: nn.Module) -> int:
    """Floating-point numbers in parameters and buffers, shared ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.is_floating_point()}
    return sum(tensor.numel() for tensor in tensors.values())


def elsewhere(model: nn.Module, dense: Iterable[nn.Linear]) -> Counter[str]:
    """Bytes of parameters and buffers by the kind of module they belong to, dense layers' weights left out."""
    seen = {module.weight.data_ptr() for module in dense}
    found: Counter[str] = Counter()
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point() and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                found[type(module).__name__] += tensor.nbytes
    return found


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


def swapped(model: nn.Module, modules: Mapping[str, nn.Module], sharing: bool = False) -> nn.Module:
    """A deep copy of the model with the named modules, with the old ones' hooks, in the place of the old ones.

    Args:
        sharing: parameters and buffers are not copied.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if sharing}
    for name, new in modules.items():
        old = model.get_submodule(name)
        new.train(old.training)
        for hooks in _HOOKS:
            getattr(new, hooks).update(getattr(old, hooks))
        memo[id(old)] = new.to(device_of(old))
    return copy.deepcopy(model, memo)


class _Enough(BaseException):
    """Ends a forward pass when all that was asked for has been seen; no ``except Exception`` of a model swallows it."""


class TorchNetwork(Network):
    """A torch model and one traced batch of data."""

    def __init__(self, model: nn.Module, data: Data | None) -> None:
        self.model = model
        self.modules = dense_modules(model)
        super().__init__(tuple(self.modules), tied_names(model))
        self.device = device_of(model)
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
        self.ending, self._reads = trace.ending(output), trace.read
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

    @property
    def numbers(self) -> int:
        return stored_numbers(self.model)

    def itemsize(self, name: str) -> int:
        return self.modules[name].weight.itemsize

    def elsewhere(self) -> Mapping[str, int]:
        return elsewhere(self.model, self.modules.values())

    def shape(self, name: str) -> tuple[int, int]:
        return self.modules[name].in_features, self.modules[name].out_features

    def weight(self, name: str) -> Tensor:
        return self.modules[name].weight.detach().T.contiguous()

    def bias(self, name: str) -> Tensor | None:
        bias = self.modules[name].bias
        return None if bias is None else bias.detach()

    def stream(self, names: tuple[str, ...], data: Data, whole: bool = True) -> Iterator[Flow]:
        once = not whole and all(self.times_called[name] == 1 for name in names)
        for batch in data:
            calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

            def note(name: str, into: dict[str, list[tuple[Tensor, Tensor]]]) -> Callable[..., None]:
                def hook(module: nn.Linear, inputs: tuple[Tensor, ...], y: Tensor) -> None:
                    x = inputs[0].reshape(-1, module.in_features).clone()  # the model may write to both later
                    into[name].append((x, y.reshape(-1, module.out_features).clone()))
                    if once and all(into.values()):
                        raise _Enough

                return hook

            batch, output = batch.to(self.device), torch.empty(0)
            handles = [self.modules[name].register_forward_hook(note(name, calls), prepend=True) for name in names]
            try:
                with evaluating(self.model), contextlib.suppress(_Enough):
                    output = main_output(self.call(batch))
            finally:
                for handle in handles:
                    handle.remove()
            if whole:
                require_finite(output)
            yield Flow(batch, output, calls)

    def gradients(self, names: tuple[str, ...], data: Data, probes: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """By the chains that follow; by one automatic differentiation for all layers where one has none."""
        if all(self.chain(name) is not None for name in names):
            yield from super().gradients(names, data, probes)
            return
        random = torch.Generator().manual_seed(0)
        for batch in data:
            seen: dict[str, list[Tensor]] = {name: [] for name in names}

            def watch(name: str, into: dict[str, list[Tensor]]) -> Callable[..., Tensor]:
                def hook(module: nn.Module, inputs: tuple[Tensor, ...], made: Tensor) -> Tensor:
                    # the first of all layers begins the graph; what is changed in place later is a copy
                    into[name].append(made if made.requires_grad else made.detach().requires_grad_())
                    return into[name][-1].clone()

                return hook

            handles = [self.modules[name].register_forward_hook(watch(name, seen), prepend=True) for name in names]
            try:
                with evaluating(self.model), frozen(self.model), torch.enable_grad():
                    output = rows_of(self.scores(main_output(self.call(batch.to(self.device)))))
            finally:
                for handle in handles:
                    handle.remove()
            places = [(name, y) for name, calls in seen.items() for y in calls]
            numbers = self.real_valued(batch.targets, output)
            yield from gradients_along(output, places, directions(output, probes, random, numbers))

    def outputs_with(self, name: str, flow: Flow, layer: Layer, candidates: Tensor) -> Tensor:
        """Vectorised with ``torch.vmap``; a network that ``vmap`` can't batch runs one candidate at a time."""

        def output(candidate: Tensor) -> Tensor:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return layer(inputs[0], candidate)

            handle = self.modules[name].register_forward_hook(hook, prepend=True)
            try:
                with evaluating(self.model):
                    return main_output(self.model(*flow.batch.inputs, **flow.batch.named))
            finally:
                handle.remove()

        if len(candidates) == 1:
            return output(candidates[0])[None]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*batching rule")  # slower, but right
                return torch.vmap(output)(candidates)
        except RuntimeError:
            return torch.stack([output(candidate) for candidate in candidates])

    def with_weights(
        self, weights: Mapping[str, Tensor], data: Data | None, biases: Mapping[str, Tensor] | None = None
    ) -> "TorchNetwork":
        known = biases or {}
        modules = {
            name: linear_from(Dense(weight), known.get(name, self.bias(name))).to(self.modules[name].weight.dtype)
            for name, weight in weights.items()
        }
        found = TorchNetwork(swapped(self.model, modules), data)
        found.times_called = dict(self.times_called)
        return found
