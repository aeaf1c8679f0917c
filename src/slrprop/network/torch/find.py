"""What a torch model is made of: layers, what their weights are computed from, and all other numbers."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from slrprop.errors import SlrpropError
from slrprop.operators import Convolution, Lookup, MatMul, Operator

COMPUTING = (BasePruningMethod, WeightNorm, SpectralNorm)  # hooks that write a weight or bias before each call
NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
TRANSPOSED = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
_USUAL = {"weight", "bias", "original_shape"}.union(
    vars(nn.Linear(1, 1, device="meta")),
    vars(nn.Conv1d(1, 1, 1, device="meta")),
    vars(nn.Embedding.from_pretrained(torch.zeros(1, 1))),
    vars(nn.ConvTranspose1d(1, 1, 1, device="meta")),
)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer (the CPU if it has neither)."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Compiled code runs as it was written, so that hooks see it; random numbers drawn are put back."""
    compiled = "torch._dynamo" in sys.modules  # its import takes a second
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
    ):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards modes and tensors that hang on modules are what they were."""
    before = [(m, m.training, {k: v for k, v in vars(m).items() if isinstance(v, Tensor)}) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), undisturbed(device_of(model)):
            yield
    finally:
        for module, mode, tensors in before:
            module.training = mode
            vars(module).update(tensors)


def plain_name(name: str) -> str:
    """A module's or tensor's name without what ``torch.compile`` puts around modules."""
    return re.sub(r"(^|\.)_orig_mod(?=\.|$)", "", name).removeprefix(".")


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """Every module by its plain name: compiled ones as what was compiled, parametrisations with what they belong to."""
    found = model.named_modules(remove_duplicate=remove_duplicate)
    return {plain_name(name): module for name, module in found if "parametrizations" not in name.split(".")}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers, those of its parametrisations among them."""
    found = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor for name, tensor in found if "." not in name or name.startswith("parametrizations.")}


def _refusal(name: str, module: nn.Module) -> str:
    """Why a model that holds this module can't be treated; empty where it can."""
    graph = module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ()
    aten = any(isinstance(node.target, torch._ops.OpOverload) for node in graph)
    if any(nn.parameter.is_lazy(tensor) or tensor.is_meta for tensor in _tensors(module).values()):
        return (
            f"layer '{name}' is not initialised (it has no values yet); load the model's weights, or run it once, first"
        )
    if "quantized" in type(module).__module__.split("."):
        return f"module '{name}' is quantised already ({type(module).__name__}); give the model as it was before, slrprop can round it itself (bits=8)"
    if aten or type(module).__name__ == "UnflattenedModule":
        return (
            "an exported program can't be rewritten; give the module that it was exported from, and export the result"
        )
    if isinstance(module, torch.jit.ScriptModule) and not name:
        return "a scripted or traced model can't be rewritten; give the module that it was made from, and script the result"
    return ""


def operator_of(module: nn.Module) -> Operator:
    """How a layer multiplies its weight."""
    if isinstance(module, nn.Linear):
        return MatMul()
    if isinstance(module, nn.Embedding):
        return Lookup()
    assert isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
    kernel, around = module.kernel_size, module._reversed_padding_repeated_twice
    padding = tuple((around[2 * axis], around[2 * axis + 1]) for axis in reversed(range(len(kernel))))
    wider = module.output_padding if module.transposed else ()
    return Convolution(kernel, module.stride, padding, module.dilation, module.groups, module.transposed, wider)


def layer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a weight that can be replaced, whose own forward computes with it, by plain name, each module once.

    Raises:
        SlrpropError: not a module, a module without values, or one whose code can't be changed.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        hint = "; give the module that it was exported from" if kind == "ExportedProgram" else ""
        raise SlrpropError(f"model must be a torch.nn.Module or the path of an .onnx file, got {kind}{hint}")
    found = named_modules(model)
    for reason in (_refusal(name, module) for name, module in found.items()):
        if reason:
            raise SlrpropError(reason)
    return {
        name: module
        for name, module in found.items()
        if (kind := layer_class(module)) is not None
        and type(module).forward is kind.forward
        and "forward" not in vars(module)
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and type(module._parameters.get("weight")) in (nn.Parameter, type(None))  # others compute in their own way
    }


def is_norm(module: nn.Module | None) -> TypeGuard[nn.BatchNorm1d]:
    """Whether that is a batch norm with statistics which computes as torch's own does."""
    own = isinstance(module, NORMS) and type(module).forward is nn.BatchNorm1d.forward and "forward" not in vars(module)
    return own and module.running_mean is not None  # type: ignore[union-attr]


def layer_class(module: nn.Module) -> type[nn.Module] | None:
    """Torch's own class of a layer, whatever was derived from it."""
    return next(
        (kind for kind in (nn.Linear, nn.Embedding, *CONVOLUTIONS, *TRANSPOSED) if isinstance(module, kind)), None
    )


def computed_arrays(module: nn.Module) -> set[str]:
    """Which of a layer's weight and bias are computed at each call: by torch's masks, norms or parametrisations."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, COMPUTING)]
    names = {hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name for hook in hooks}
    return names | {side for side in ("weight", "bias") if is_parametrized(module, side)}


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A layer's weight, as torch stores it, and bias (n,) as in evaluation mode, without gradients; the module stays as it is."""
    with evaluating(module):
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, COMPUTING):
                hook(module, ())
        weight, bias = module.weight, getattr(module, "bias", None)
        return weight.detach(), None if bias is None else bias.detach()  # type: ignore[operator]


def _sources(module: nn.Module) -> list[Tensor]:
    """The stored tensors that a layer's weight is, or is computed from."""
    pattern = re.compile(r"(parametrizations\.)?weight(_|\.|$)")
    return [tensor for name, tensor in _tensors(module).items() if pattern.match(name)]


def binding(module: nn.Module) -> str:
    """Why nothing may take a layer's place; empty where something may."""
    kind, computed, base = type_before_parametrizations(module), computed_arrays(module), layer_class(module)
    assert base is not None
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"its border is padded by '{module.padding_mode}' and not by zeros"
    if getattr(module, "max_norm", None) is not None:
        return "it scales its rows while it runs (max_norm)"
    if getattr(module, "transposed", False) and module.groups != 1:
        return "it is a transposed convolution in groups"
    if any(side in vars(module) and side not in computed for side in ("weight", "bias")):
        return "its weight or bias is computed by code that a replacement would lack"
    own = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias", "parametrizations"}
    own -= {f"{side}_{part}" for side in computed for part in ("orig", "mask", "g", "v", "u")}
    if kind is not base:
        above = kind.__mro__[: kind.__mro__.index(base)]
        own |= (set(vars(module)) - _USUAL) | {key for cls in above for key in vars(cls) if not hasattr(base, key)}
    own = {key for key in own if not key.startswith("_")}
    return f"it is a {kind.__name__} with its own '{min(own)}', which a replacement would lack" if own else ""


def tied_names(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """For every layer, the other modules' tensors that its weight is, or is computed from."""
    owners: dict[int, list[tuple[str, int]]] = {}
    for path, module in named_modules(model, remove_duplicate=False).items():
        for key, tensor in _tensors(module).items():
            owners.setdefault(tensor.data_ptr(), []).append((f"{path}.{key}", id(module)))
    return {
        name: tuple(place for t in _sources(module) for place, owner in owners[t.data_ptr()] if owner != id(module))
        for name, module in layers.items()
    }


def elsewhere(model: nn.Module, layers: Iterable[nn.Module]) -> Counter[str]:
    """Bytes of parameters and buffers by the kind of module they belong to, layers' weights left out."""
    seen = {tensor.data_ptr() for module in layers for tensor in _sources(module)}
    found: Counter[str] = Counter()
    for module in named_modules(model).values():
        for tensor in _tensors(module).values():
            if tensor.is_floating_point() and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                found[_kind(module)] += tensor.nbytes
    return found


def _kind(module: nn.Module) -> str:
    """What a module is, in words that ONNX files share: torch's own class without its axes, else the user's."""
    kind = type_before_parametrizations(module)
    known = next((cls for cls in kind.__mro__ if cls.__module__.startswith("torch.nn.modules.")), nn.Module)
    general = known.__module__.rpartition(".")[2] in ("module", "container", "linear")
    return re.sub(r"(\dd|Cell|Bag)$", "", (kind if general else known).__name__)
