"""A network as one matrix: the product of its layers, or its mean gradient."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slrprop.checks import require_choice
from slrprop.data import Batch, Data, open_data
from slrprop.errors import SlrpropError
from slrprop.losses import rows_of
from slrprop.network import OnnxNetwork, TorchNetwork, open_network
from slrprop.network.base import Network
from slrprop.network.onnx.constants import tensor_of
from slrprop.network.onnx.feed import Part
from slrprop.network.onnx.gradients import OPS, Behind, Op
from slrprop.network.samples import alike
from slrprop.network.torch.find import evaluating
from slrprop.network.torch.network import frozen, main_output

Model = nn.Module | str | Path
WAYS = ("auto", "product", "gradients")
SAME = 1e-4  # of the largest entry: between gradients at samples of a linear map
ACTIVATIONS = {  # torch's functions, which the product leaves out
    "celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid", "log_softmax", "logsigmoid", "mish", "prelu", "relu",
    "relu6", "rrelu", "selu", "sigmoid", "silu", "softmax", "softplus", "softsign", "tanh", "threshold",
}  # fmt: skip
ACTIVATION_OPS = (
    "Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "LogSoftmax", "Mish", "PRelu", "Relu", "Selu", "Sigmoid", "Softmax",
    "Softplus", "Softsign", "Tanh",
)  # fmt: skip
STRAIGHT: dict[str, Op] = (
    OPS
    | dict.fromkeys(ACTIVATION_OPS, lambda node, x, *_: x)
    | {"Erf": lambda node, x: torch.ones_like(x)}  # x (1 + erf(x)) / 2, as GELU is often written, becomes x
)


def collapse(model: Model, data: Any = None, by: str = "auto") -> Tensor:
    """The network as one matrix (m x c), inputs x outputs: how strongly, and in which direction, each input drives each output.

    Args:
        model: a torch module or the path of an ONNX file.
        data: anything :class:`slrprop.data.Data` takes, of one input of real numbers, which are flattened to m. Only the product can do without.
        by: *product*: of all layers' matrices, for chains of dense layers, whatever they are stored as. It is what the network computes
            without its activations and a final softmax, if that is a linear map and a constant; batch norms are included, and beside skip
            connections it is the sum over the paths. *gradients*: the mean over the data of the outputs' gradients (of a softmax: of
            its logarithm), exact for ReLU networks in the region of each sample. *auto*: the product where there is one, else gradients.

    Raises:
        SlrpropError: no product, no data for gradients, or an operation that has none here.

    >>> model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 2))
    >>> torch.allclose(collapse(model), (model[2].weight @ model[0].weight).T)
    True
    """
    return collapse_alike([model], data, by)[1][0]


def collapse_alike(models: Sequence[Model], data: Any = None, by: str = "auto") -> tuple[str, list[Tensor]]:
    """Several networks, like an original and its compressed form, each as by :func:`collapse`, all in the same way, and that way."""
    require_choice("by", by, WAYS)
    given = None if data is None else open_data(data)
    networks = [open_network(model, given) for model in models]
    if by != "gradients":
        products = [_product(network, given) for network in networks]
        if all(matrix is not None for matrix in products):
            return "product", [matrix for matrix in products if matrix is not None]
        if by == "product":
            raise SlrpropError(
                "the network is no chain of dense layers: more than its activations keeps it from being one matrix; ask for by='gradients'"
            )
    if given is None:
        raise SlrpropError("the network is collapsed by its gradients, which need data; give some samples of its input")
    return "gradients", [_mean_gradients(network, given) for network in networks]


def input_of(batch: Batch) -> tuple[Tensor, int]:
    """The only input of a batch, of real numbers, and the axis of its samples."""
    values = batch.values()
    for key, value in values.items() if len(values) == 1 else ():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value, batch.axes.get(key, 0)
    kinds = ", ".join(str(getattr(value, "dtype", type(value).__name__)) for value in values.values())
    raise SlrpropError(
        f"a network is interpreted by one input of real numbers, and the data has {len(values)} ({kinds}); "
        "store measures as float32; what is looked up, like tokens, has no gradient"
    )


def samples_of(batches: Iterable[Batch]) -> Tensor:
    """The only input of all batches, samples on the first axis."""
    return torch.cat([value.movedim(axis, 0) for value, axis in map(input_of, batches)])


def _product(network: Network, data: Data | None) -> Tensor | None:
    """The product of the layers' matrices; None where the network without its activations is no linear map and a constant."""
    if data is None and not network.names:
        return None
    if data is None:  # some network whose input is what its first dense layer takes
        first, random = network.names[0], torch.Generator().manual_seed(0)
        data = Data(torch.randn(8, network.shape(first)[0], generator=random).to(network.weight(first)))
    try:
        few = next(iter(data)).take(slice(8))
        found = [torch.stack(list(columns), 2) for columns in _gradients(network, [few], True)]
    except SlrpropError:
        return None
    each = torch.cat(found)
    return each[0] if each.any() and (each - each[0]).abs().max() <= SAME * each[0].abs().max() else None


def _mean_gradients(network: Network, data: Data) -> Tensor:
    total, count = torch.zeros(()), sum(batch.samples for batch in data)
    for columns in _gradients(network, data, False):
        total = total + torch.stack([column.sum(0) for column in columns], 1).double().cpu()
    return (total / count).float()


def _gradients(network: Network, data: Iterable[Batch], straight: bool) -> Iterator[Iterator[Tensor]]:
    """Part by part of the data: of each output the gradient at each sample by itself (p, m).

    Args:
        straight: activations and a final softmax are left out; else a final softmax counts as its logarithm.
    """
    for whole in data:
        axis = input_of(whole)[1]
        for batch, x, output in _computed(network, whole, straight):
            with torch.enable_grad():
                scores = output if straight else network.scores(output)
                rows = rows_of(network.classes_last(scores.movedim(network.place(batch), 0)))
                columns = [rows[:, k].sum() for k in range(rows.shape[-1])]
            if not rows.requires_grad:
                raise SlrpropError(
                    "the network's output does not change smoothly with its input, so no gradient tells which input drives it"
                )
            found = (torch.autograd.grad(column, x, retain_graph=True, materialize_grads=True)[0] for column in columns)
            yield (one.movedim(axis, 0).flatten(1)[: batch.samples] for one in found)  # without padding


class _NoActivations(TorchFunctionMode):
    """Activations give what they are given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if getattr(func, "__name__", "").strip("_") in ACTIVATIONS else func(*args, **(kwargs or {}))


def _computed(network: Network, batch: Batch, straight: bool) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """A batch in parts: each, its input, and the output as a function of it."""
    if isinstance(network, OnnxNetwork):
        yield from ((part.batch, *_computed_nodes(network, part, straight)) for part in network.parts(batch))
    elif isinstance(network, TorchNetwork):
        for part in network.parts_of(batch):
            x = input_of(part)[0].detach().to(network.device).clone().requires_grad_()
            fed = part._replace(inputs=(x,) * len(part.inputs), named=dict.fromkeys(part.named, x))
            left_out = _NoActivations() if straight else nullcontext()
            with evaluating(network.model), frozen(network.model), torch.enable_grad(), left_out:
                output = main_output(network.call(fed))
            yield part, x, output


def _computed_nodes(network: OnnxNetwork, part: Part, straight: bool) -> tuple[Tensor, Tensor]:
    """By torch operations for the nodes, if they give what ONNX Runtime gives; with padding."""
    graph, name = network.graph, network.graph.inputs[0].name
    behind = Behind(graph, {name: name})
    session = network.file.session(sorted((behind.reads | {graph.main}) - {name}))
    found = {**part.feed, **network.run(session, part.feed)}
    made = behind.run(found) if behind.watched else None
    if made is not None and not alike(made[0].detach(), tensor_of(found[graph.main])):
        made = None
    if made is not None and straight:
        made = Behind(graph, {name: name}, STRAIGHT).run(found)
    if made is None or name not in made[1]:
        raise SlrpropError(
            f"'{network.file.path}' is no chain of dense layers, and has an operation between its input and its output "
            "that no gradient is known of here; interpret the torch module that it was exported from"
        )
    return made[1][name], made[0]
