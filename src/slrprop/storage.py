"""Models as safetensors files: tensors, and in the header which layers are factored. No pickle."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from slrprop.errors import SlrpropError
from slrprop.files import replacing, require_regular, scratch
from slrprop.forms import Bias, Dense, Fit, restored
from slrprop.forms.base import KINDS
from slrprop.network.torch.find import NORMS, layer_modules, named_modules, operator_of, plain_name, weight_and_bias
from slrprop.network.torch.fold import Folded, resized
from slrprop.network.torch.modules import FactoredLayer, layer_from, note_shape, original_shape
from slrprop.network.torch.network import swapped
from slrprop.plan import arrays_digest, header_refusal

FORMAT = "slrprop-model"
VERSION = "2"


def _unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with tied tensors under their first name only, names as if nothing were compiled.

    Raises:
        SlrpropError: a module keeps something there that is no tensor.
    """
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    state = {}
    for stored, tensor in model.state_dict().items():
        name = plain_name(stored)
        if not isinstance(tensor, Tensor):
            raise SlrpropError(
                f"the model keeps '{name}' ({type(tensor).__name__}) in its state, and safetensors holds tensors only"
            )
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        tensor = tensor.detach().cpu().contiguous()
        state[name] = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
    return state


def _write(model: nn.Module, path: Path) -> None:
    """Write what :func:`save` writes; no copy of the tensors is held."""
    # what the header says about layers: their forms, and their original shapes where neurons around them were removed
    kinds: dict[str, dict[str, Any]] = {}
    for name, module in named_modules(model).items():
        if isinstance(module, Folded):
            kinds[name] = {"kind": "folded"}
        elif isinstance(module, FactoredLayer):
            kinds[name] = module.factors().description()
        if shape := original_shape(module):
            kinds[name] = kinds.get(name, {"kind": Dense.kind}) | {"original_shape": list(shape)}
    state = _unique_state(model)
    head = {"format": FORMAT, "version": VERSION, "layers": json.dumps(kinds)}
    try:
        safetensors.torch.save_file(state, path, head | {"sha256": arrays_digest(head["layers"], state)})
    except safetensors.SafetensorError as error:
        told = re.search(r"os error (\d+)", str(error))  # it wraps the system's in words of its own
        raise OSError(int(told[1]), os.strerror(int(told[1]))) if told else OSError(errno.EIO, str(error)) from error


def size_of(model: nn.Module) -> int:
    """Bytes of the file that :func:`save` writes."""
    with scratch() as folder:
        save(model, folder / "model")
        return (folder / "model").stat().st_size


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model's tensors, factored layers included, as safetensors.

    Raises:
        SlrpropError: the file can't be written, or another one than this function writes is there, which stays as it is.
    """
    with replacing(path, header_refusal("is no model that slrprop saved", FORMAT)) as part:
        _write(model, part)


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """A copy of ``model`` with the layers and tensors of a saved one.

    Args:
        model: the network the saved one was made from (its weights do not matter); untouched.

    Raises:
        SlrpropError: unreadable or damaged file, or one made from another network.
    """
    require_regular(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT or header.get("version") != VERSION:
                raise SlrpropError(
                    f"'{path}' was not written by slrprop.save (version {VERSION}); its header says {header.get('format')!r} {header.get('version')!r}"
                )
            kinds = json.loads(header.get("layers", ""))
            state = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, safetensors.SafetensorError, ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, SlrpropError):
            raise
        raise SlrpropError(f"'{path}' can't be read as a safetensors file: {error}") from error
    if not isinstance(kinds, dict) or not all(isinstance(kind, dict) for kind in kinds.values()):
        raise SlrpropError(f"the header of '{path}' names no layers; the file is damaged")
    if header.get("sha256") != arrays_digest(header["layers"], state):
        raise SlrpropError(f"'{path}' is damaged: its tensors differ from their checksum; save it again")
    layers, modules = layer_modules(model), named_modules(model)
    loaded = swapped(
        model, {name: _skeleton(modules.get(name), layers.get(name), name, kind, state) for name, kind in kinds.items()}
    )
    places = {plain_name(key): key for key in loaded.state_dict()}
    aliases = {places[name] for name in set(places) - set(_unique_state(loaded))}
    try:
        missing, unexpected = loaded.load_state_dict({places.get(k, k): v for k, v in state.items()}, strict=False)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise SlrpropError(f"'{path}' does not fit this model: {reason}") from error
    wrong = [f"no {name}" for name in missing if name not in aliases] + [f"a foreign {name}" for name in unexpected]
    if wrong:
        raise SlrpropError(f"'{path}' does not fit this model: it has {', '.join(wrong[:4])}")
    return loaded


def _skeleton(
    place: nn.Module | None, old: nn.Module | None, name: str, description: dict[str, Any], state: dict[str, Tensor]
) -> nn.Module:
    """A factored layer of the shapes that the file has for it; its values are loaded later."""
    kind = str(description.get("kind"))
    if isinstance(place, NORMS):
        return Folded() if kind == "folded" else resized(place, len(state.get(f"{name}.running_mean", ())))
    if old is None or kind not in KINDS:
        raise SlrpropError(
            f"the file has a {kind} layer '{name}', but this model has no layer of that name that could hold one"
        )
    prefix, operator = f"{name}." if name else "", operator_of(old)
    own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    own |= {"weight": own["matrix"]} if "matrix" in own else {}
    try:
        factors = Dense(operator.matrix(own["weight"])) if kind == Dense.kind else restored(description, own)
        bias = Bias(own["bias"]) if "bias" in own else Bias.restored(own, factors.shape[1])
        before, after = description.get("original_shape"), factors.shape
        m, n = before or after
    except (KeyError, IndexError, TypeError, ValueError, SlrpropError) as error:
        raise SlrpropError(f"the tensors of layer '{name}' make no {kind} layer: {error}") from error
    shape = tuple(operator.matrix(weight_and_bias(old)[0]).shape)
    if (m, n) != shape:
        raise SlrpropError(f"layer '{name}' is {shape[0]} x {shape[1]} in this model, but {m} x {n} in the file")
    module = layer_from(Fit(factors, bias), operator)
    if before:
        note_shape(module, (m, n))
    return module
