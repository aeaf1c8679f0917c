"""Torch networks: find layers, stream what flows through them, swap them."""

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from slrprop.data import Batch, Data
from slrprop.errors import SlrpropError, first_line
from slrprop.forms import Fit
from slrprop.losses import rows_of
from slrprop.network.base import Changing, Flow, Network, gradients_along, require_finite
from slrprop.network.chain import fold
from slrprop.network.layer import Layer
from slrprop.network.reading import LAST, Raised, Reading
from slrprop.network.torch import find
from slrprop.network.torch.modules import layer_from
from slrprop.network.torch.trace import Held, Trace
from slrprop.operators import MatMul


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that go at the end of a block."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


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
    if hasattr(result, "logits"):
        return main_output(result.logits)
    if isinstance(result, Mapping):
        return main_output(result["logits"] if "logits" in result else next(iter(result.values())))
    if isinstance(result, (tuple, list)) and result:
        return main_output(result[0])
    raise SlrpropError(
        f"the model returned {type(result).__name__}; slrprop needs a tensor, or a tuple or mapping that starts with one"
    )


def output_name(result: Any) -> str:
    """What a mapping of outputs, or an object with ``logits``, calls the main one."""
    if hasattr(result, "logits") or (isinstance(result, Mapping) and "logits" in result):
        return "logits"
    return str(next(iter(result), "")) if isinstance(result, Mapping) else ""


def stored_numbers(model: nn.Module) -> int:
    """Floating-point numbers in parameters and buffers, shared ones once."""
    state = (value for value in model.state_dict().values() if isinstance(value, Tensor))
    tensors = {tensor.data_ptr(): tensor for tensor in state if tensor.is_floating_point()}
    return sum(tensor.numel() for tensor in tensors.values())


_HOOKS = [key for key in vars(nn.Module()) if key.startswith(("_forward_hooks", "_forward_pre_hooks"))]


def swapped(model: nn.Module, modules: Mapping[str, nn.Module], sharing: bool = False) -> nn.Module:
    """A deep copy of the model with the named modules, with the old ones' hooks and what hangs on them, in the place of the old ones.

    Hooks that compute the old ones' weights are left out: the new ones have their own.

    Args:
        sharing: parameters and buffers are not copied.

    Raises:
        SlrpropError: the model can't be copied, or a copy would run the original.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if sharing}
    places = find.named_modules(model)
    for name, module in places.items():
        forward = vars(module).get("forward")
        if isinstance(forward, FunctionType) and forward.__closure__:
            raise SlrpropError(f"module '{name}' has a function in the place of its forward, which in a copy would run the original; write it as a method (torch.compile of the module itself is fine)")  # fmt: skip
        values = [value for value in vars(module).values() if isinstance(value, Tensor) and value.grad_fn is not None]
        memo |= {id(value): value.detach().clone() for value in values}  # these can't be copied, nor need they be
    for name, new in modules.items():
        old = places[name]
        new.train(old.training)
        for hooks in _HOOKS:
            kept = {key: hook for key, hook in getattr(old, hooks).items() if not isinstance(hook, find.COMPUTING)}
            getattr(new, hooks).update(kept)
        own = {"weight", "bias", "original_shape", *vars(new)}
        vars(new).update({key: value for key, value in vars(old).items() if key not in own})  # code may read its stride
        memo[id(old)] = new.to(find.device_of(old))
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # somebody else's modules: they may hold anything
        raise SlrpropError(f"the model can't be copied ({first_line(error)}), and slrprop changes a copy; take out what can't be") from error  # fmt: skip
    for module in copied.modules():
        if hasattr(module, "save_pretrained") and any(part in modules.values() for part in module.modules()):
            vars(module).update(dict.fromkeys(filter(partial(hasattr, module), _STORES), unstorable))
    return copied


_STORES = ("save_pretrained", "push_to_hub", "save_to_hub", "save")  # a library's own ways to store its models


def unstorable(*args: Any, **kwargs: Any) -> None:
    """Refuse to store a model in a way that gives random weights when it is loaded."""
    raise SlrpropError(
        "this model was rewritten, so its library would load it with random weights; store it by slrprop.save(model, path), "
        "and load it by slrprop.load(model, path), the model being one of the original's class"
    )


class _Enough(BaseException):
    """Ends a forward pass when all that was asked for has been seen; no ``except Exception`` of a model swallows it."""


class TorchNetwork(Network):
    """A torch model and one traced batch of data."""

    def __init__(self, model: nn.Module, data: Data | None, reading: Reading | None = None) -> None:
        self.model = model
        self.modules = find.layer_modules(model)
        self.arrays = {name: find.weight_and_bias(module) for name, module in self.modules.items()}
        tied, layers = find.tied_names(model, self.modules), {}
        for name, module in self.modules.items():
            operator = find.operator_of(module)
            m, n = operator.matrix(self.arrays[name][0]).shape
            layers[name] = Layer(name, operator, (m, n), tied=tied[name], held=find.binding(module))
        super().__init__(layers)
        self.device, self.reading = find.device_of(model), reading
        for name, arrays in self.arrays.items():
            if not all(torch.isfinite(array).all() for array in arrays if array is not None):
                raise SlrpropError(
                    f"layer '{name}' {self.shape(name)} holds NaN or infinite weights; repair the model first"
                )
        if data is not None:
            self._follow(data)

    def _follow(self, data: Data) -> None:
        """Trace the first batch: in which order layers are called, and what follows each."""
        first, trace = next(iter(data)), Trace()
        if any(isinstance(value, np.ndarray) for value in first.values().values()):
            raise SlrpropError("an input of the data holds text, which a torch module can't take; give numbers")
        batch = next(self.parts_of(first)).to(self.device)
        with hooked(trace.watch(self.modules)), find.evaluating(self.model), parametrize.cached():
            with trace:
                result = self.call(batch)
            weights: dict[str, Any] = {name: module.weight for name, module in self.modules.items()}
        self.look(data)
        output, made = main_output(result), trace.made
        self.ending, self._reads = trace.ending(output), trace.read
        if self.reading is None:
            axis = self.place(batch)

            def raised(place: int, unit: int) -> Raised:
                with find.evaluating(self.model), Trace(place, unit) as again:
                    return Raised(main_output(self.call(batch)).movedim(axis, 0), *again.products[place - 1])

            last = range(len(trace.products), max(len(trace.products) - LAST, 0), -1)
            self.read(output_name(result), output.movedim(axis, 0), batch, data, last, raised)
        for name, weight in weights.items():
            # a product outside the modules' own forward reads a weight: such a layer can't be replaced
            own = sum(len(made[other]) for other, twin in weights.items() if twin is weight)
            calls = len(made[name]) if trace.reads(weight) <= own else 0
            count = sum(len(self.operator(name).outputs(trace.calls[call].result)) for call in made[name])
            positions = max(1, count // max(1, calls * batch.samples))
            self.layers[name] = replace(self.layers[name], calls=calls, positions=positions)
        self.order = tuple(sorted((name for name in made if self.layers[name].calls), key=lambda name: made[name][0]))
        norms = trace.norms(
            {key: module for key, module in find.named_modules(self.model).items() if find.is_norm(module)}
        )
        for name in self.order:
            if len(made[name]) == 1:
                start = made[name][0]
                self._paths[name] = path = trace.follow(start, result, output, norms)
                y = trace.calls[start].result
                if path.whole and y.ndim < 2:
                    raise SlrpropError(
                        f"layer '{name}' was handed one sample without an axis of samples; give batches: the samples stacked into one array, or a DataLoader"
                    )
                dense = path.whole and isinstance(self.operator(name), MatMul)
                self._chains[name] = fold(path.elements, rows_of(y)[0]) if dense else None

    def outputs_of(self, batches: Iterable[Batch]) -> list[Tensor]:
        with find.evaluating(self.model):
            return [main_output(self.call(batch.to(self.device))) for batch in batches]

    def call(self, batch: Batch) -> Any:
        """The model's result for a batch (use inside :func:`find.evaluating`).

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

    def _tried(self, batch: Batch) -> tuple[Tensor, int]:
        batch = batch.to(self.device)
        held = Held((*self.model.parameters(), *self.model.buffers(), *batch.inputs, *batch.named.values()))

        def note(*_: Any) -> None:
            self.standing = max(self.standing, held.alive // batch.samples)

        handles = [module.register_forward_pre_hook(note) for module in self.modules.values()]
        with hooked(handles), find.evaluating(self.model), held:
            return main_output(self.call(batch)), held.bytes

    @property
    def numbers(self) -> int:
        return stored_numbers(self.model)

    def itemsize(self, name: str) -> int:
        return self.arrays[name][0].itemsize

    def elsewhere(self) -> Mapping[str, int]:
        return find.elsewhere(self.model, self.modules.values())

    def weight(self, name: str) -> Tensor:
        return self.operator(name).matrix(self.arrays[name][0]).contiguous()

    def bias(self, name: str) -> Tensor | None:
        return self.arrays[name][1]

    def stream(self, names: tuple[str, ...], data: Data, whole: bool = True) -> Iterator[Flow]:
        once, first = not whole and all(self.layers[name].calls == 1 for name in names), 0
        calls: dict[str, list[tuple[Tensor, Tensor]]]

        def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            operator = self.operator(name)
            rows = operator.inputs(inputs[0], first), operator.outputs(y, first)
            calls[name].append((rows[0].clone(), rows[1].clone()))  # the model may write to both later
            if once and all(calls.values()):
                raise _Enough

        for batch in self.batches(data):
            calls = {name: [] for name in names}
            batch, output = batch.to(self.device), torch.empty(0)
            place = self.place(batch) if whole else 0
            handles = [self.modules[name].register_forward_hook(partial(note, name), prepend=True) for name in names]
            with hooked(handles), find.evaluating(self.model), contextlib.suppress(_Enough):
                output = main_output(self.call(batch)).movedim(place, 0)
            if whole:
                require_finite(output)
            first += batch.samples
            yield self.flow(batch, output, calls) if whole else Flow(batch, output, calls)

    def gradients(self, names: tuple[str, ...], data: Data, probes: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """By the chains that follow; by one automatic differentiation for all layers where one has none."""
        if all(self.chain(name) is not None for name in names):
            yield from super().gradients(names, data, probes)
            return
        random = torch.Generator().manual_seed(0)
        seen: dict[str, list[Tensor]]

        def watch(name: str, module: nn.Module, inputs: tuple[Tensor, ...], made: Tensor) -> Tensor:
            # the first of all layers begins the graph; what is changed in place later is a copy
            seen[name].append(made if made.requires_grad else made.detach().requires_grad_())
            return seen[name][-1].clone()

        for batch in self.batches(data):
            seen = {name: [] for name in names}
            place = self.place(batch)
            handles = [self.modules[name].register_forward_hook(partial(watch, name), prepend=True) for name in names]
            with hooked(handles), find.evaluating(self.model), frozen(self.model), torch.enable_grad():
                output = main_output(self.call(batch.to(self.device))).movedim(place, 0)
                output = rows_of(self.classes_last(self.scores(output)))
            places = [(name, y) for name, calls in seen.items() for y in calls]
            along = self.directions(output, batch.targets, probes, random)
            yield from gradients_along(output, places, along, self.rows_of(names))

    def outputs_with(self, name: str, flow: Flow, layer: Changing, candidates: Tensor) -> Tensor:
        """Vectorised with ``torch.vmap``; a network that ``vmap`` can't batch runs one candidate at a time."""
        place = self.place(flow.batch)

        def output(candidate: Tensor) -> Tensor:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return layer(inputs[0], candidate)

            with self.modules[name].register_forward_hook(hook, prepend=True), find.evaluating(self.model):
                output = main_output(self.model(*flow.batch.inputs, **flow.batch.named)).movedim(place, 0)
                return self.classes_last(output)

        if len(candidates) == 1:
            return output(candidates[0])[None]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*batching rule")  # slower, but right
                return torch.vmap(output)(candidates)
        except RuntimeError:
            return torch.stack([output(candidate) for candidate in candidates])

    def with_fits(self, fits: Mapping[str, Fit], data: Data | None) -> "TorchNetwork":
        modules = {
            name: layer_from(fit.over(self.bias(name)), self.operator(name)).to(self.arrays[name][0].dtype)
            for name, fit in fits.items()
        }
        found = TorchNetwork(swapped(self.model, modules, sharing=True), data, self.reading)
        found.layers |= {name: replace(layer, calls=self.layers[name].calls) for name, layer in found.layers.items()}
        found.at_once = self.at_once
        return found
