"""Torch models as ONNX files, compared with ONNX Runtime before they are kept."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from slrprop.data import TARGET_KEYS, as_tensor, by_name
from slrprop.errors import SlrpropError, first_line
from slrprop.files import replacing, scratch
from slrprop.forms import Dense
from slrprop.network.onnx.census import OWN
from slrprop.network.onnx.file import OnnxFile
from slrprop.network.onnx.rewrite import placed
from slrprop.network.onnx.tensors import no_model
from slrprop.network.torch.find import device_of, evaluating
from slrprop.network.torch.modules import FactoredLayer, in_place_of_layers
from slrprop.network.torch.network import swapped

RELATIVE, ABSOLUTE = 1e-3, 1e-4  # float32 sums in another order
OPSET = 21


def session(path: str | Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU (``threads`` 0: the runtime's choice)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and remarks from the terminal."""
    silent, before = io.StringIO(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if not isinstance(result, (Mapping, tuple, list)):
        raise SlrpropError(
            f"the model can't be exported to ONNX: it returns {type(result).__name__}, not tensors or tuples or mappings of them; let its forward return those (Hugging Face: config.use_cache = False)"
        )
    values = list(result.values()) if isinstance(result, Mapping) else list(result)
    return [tensor for value in values if value is not None for tensor in _tensors(value)]


def _place(layer: FactoredLayer, x: Tensor) -> Tensor:
    """A node that stands for a factored layer until its own are written, as they are stored."""
    kind = x.dtype if x.is_floating_point() else layer.like.dtype
    like = layer.operator.compute(Dense(x.new_empty(layer.shape, dtype=kind)), None, x)
    made: Tensor = torch.onnx.ops.symbolic(
        f"{OWN}::Layer", (x,), {"index": layer.exported_as}, dtype=kind, shape=like.shape, version=1
    )
    return made


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_input: Any,
    dynamic_batch: bool = True,
    batch_axis: int | Mapping[Any, int] = 0,
) -> float:
    """Write the model as ONNX, check it, and run it: its outputs must equal the torch model's.

    Args:
        example_input: a tensor or array, a tuple of them, or a mapping by the names of the model's arguments (a batch of
            a data loader: targets are left out), with the batch in the first axis (two samples or more, if it is to stay
            dynamic).
        dynamic_batch: leave the batch size open.
        batch_axis: where samples stand, of all inputs or by position of those whose samples are not on the first axis.

    Returns:
        The largest absolute difference between torch and ONNX Runtime on the example, over all outputs.

    Raises:
        SlrpropError: the model can't be exported, the file's outputs differ, or another file than a model is there; no file
            is left then, and what was there stays.
    """
    given = by_name(example_input)
    if isinstance(given, Mapping):
        given = {str(key): value for key, value in given.items() if key not in TARGET_KEYS and value is not None}
    else:  # by position
        given = dict(enumerate(given if isinstance(given, (tuple, list)) else (given,)))
    items = {key: as_tensor(value, "the example input") for key, value in given.items()}
    inputs = tuple(item.cpu() for key, item in items.items() if isinstance(key, int))
    named = {key: item.cpu() for key, item in items.items() if isinstance(key, str)}
    tensors = (*inputs, *named.values())
    if not tensors or any(item.ndim == 0 for item in tensors):
        raise SlrpropError(f"the example input must be tensors with the batch in the first axis, got {example_input!r}")
    axes = {key: batch_axis if isinstance(batch_axis, int) else batch_axis.get(key, 0) for key in items}
    for key, item in items.items():
        if not 0 <= axes[key] < item.ndim:
            raise SlrpropError(f"batch_axis {axes[key]!r} is no axis of an example of shape {tuple(item.shape)}")
    if dynamic_batch and any(item.shape[axes[key]] < 2 for key, item in items.items()):
        raise SlrpropError(
            "the example input has one sample; give two or more, or dynamic_batch=False for a fixed batch of one"
        )
    if any(tensor.dtype == torch.bfloat16 for tensor in (*tensors, *model.parameters())):
        raise SlrpropError(
            "the model can't be exported to ONNX in bfloat16, which ONNX Runtime does not compute on the CPU; convert it with .float()"
        )
    if device_of(model).type != "cpu":
        model = swapped(model, {}).cpu()
    with evaluating(model):
        try:
            want = [tensor.cpu().numpy() for tensor in _tensors(model(*inputs, **named))]
        except SlrpropError:
            raise
        except Exception as error:  # somebody else's forward
            shapes = ", ".join(str(tuple(item.shape)) for item in tensors)
            raise SlrpropError(f"the model can't take data of shape {shapes}: {first_line(error)}") from error
        layers = [module for module in model.modules() if isinstance(module, FactoredLayer)]
        for index, layer in enumerate(layers):
            layer.exported_as = index  # the exporter may run a copy
        with replacing(path, no_model) as part:
            dynamic = torch.export.ShapesCollection()
            for tensor, axis in zip(tensors, axes.values(), strict=True):
                dynamic[tensor] = {axis: torch.export.Dim("batch")}
            try:
                with _quiet(), in_place_of_layers(lambda layer, x: _place(layer, x)):
                    torch.onnx.export(
                        model, inputs, str(part), kwargs=named, dynamo=True,
                        dynamic_shapes=dynamic.dynamic_shapes(model, inputs, named) if dynamic_batch else None,
                        external_data=False, opset_version=OPSET, optimize=True, verbose=False,
                    )  # fmt: skip
                with scratch(part.parent) as folder:
                    file = OnnxFile.open(part)  # whose edited copy lacks stack traces with this machine's paths
                    file = placed(file, layers) if layers else file.edited(lambda graph: {})
                    del file.proto.metadata_props[:]
                    file.write(folder / part.name)
                    (folder / part.name).replace(part)
                onnx.checker.check_model(str(part), full_check=True)
            except OSError:
                raise
            except Exception as error:  # the exporter raises whatever it meets
                root: BaseException = error
                while root.__cause__ is not None:
                    root = root.__cause__
                raise SlrpropError(f"the model can't be exported to ONNX: {first_line(root)}") from error
            runtime = session(part)
            slots = [slot.name for slot in runtime.get_inputs() if slot.name not in named]
            fed = {**named, **dict(zip(slots, inputs, strict=True))}
            feed = {name: item.cpu().numpy() for name, item in fed.items()}
            got = runtime.run(None, feed)
            for index, (mine, theirs) in enumerate(zip(want, got, strict=True)):
                if mine.shape != theirs.shape or not np.allclose(mine, theirs, RELATIVE, ABSOLUTE):
                    raise SlrpropError(
                        f"output {index} of the ONNX file differs from the torch model's by more than {ABSOLUTE}; nothing was written"
                    )
    return max(float(np.abs(mine - theirs).max(initial=0)) for mine, theirs in zip(want, got, strict=True))
