"""The few verbs a user needs: inspect, plan, apply."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, overload

from torch import Tensor, nn

from slrprop.arrange import arranged
from slrprop.checks import require_choice, suggestion
from slrprop.data import Axes, open_data
from slrprop.errors import SlrpropError
from slrprop.files import together
from slrprop.fit.quantize import bias_in_few_bits, quantised
from slrprop.fit.statistics import QUANTITIES
from slrprop.forms import Dense, Fit, Form, Quantized
from slrprop.inspection import Inspection, LayerInfo, Model, inspect, warn_if_compressed
from slrprop.methods import METHODS, Decision, Method, Problem, Settings, find_method
from slrprop.network import folded, open_network
from slrprop.network.base import Network, fingerprint
from slrprop.network.onnx.file import OnnxFile
from slrprop.network.onnx.network import OnnxNetwork
from slrprop.network.onnx.parity import Parity, write
from slrprop.network.onnx.rewrite import rewritten
from slrprop.network.torch.find import computed_arrays, layer_modules, operator_of, weight_and_bias
from slrprop.network.torch.fold import carried
from slrprop.network.torch.modules import layer_from, note_shape, original_shape
from slrprop.network.torch.network import swapped
from slrprop.plan import LayerPlan, Plan, pack
from slrprop.selection import treated

__all__ = ["Inspection", "LayerInfo", "apply", "inspect", "plan"]


def plan(
    model: Model,
    data: Any,
    method: str = "slrprop",
    layers: str | list[str] | tuple[str, ...] | None = None,
    rank: int = 16,
    sparsity_rate: float = 0.5,
    reduction_rate: float = 0.5,
    class_axis: int | None = None,
    ignore_label: int | None = None,
    batch_axis: Axes = None,
    **settings: Any,
) -> Plan:
    """Decide for each layer what to do with it.

    Args:
        model: a torch module, evaluated as it is (neither its weights nor its mode change), or the path of an ONNX file.
        data: calibration samples, anything :class:`slrprop.data.Data` takes; None for methods that need none.
        method: see ``slrprop methods``.
        layers: names or glob patterns; None for all layers that the method can treat.
        rank, sparsity_rate, reduction_rate: settings of the method, ignored by methods that keep no rank or shorten no
            neurons.
        class_axis: the axis of the network's outputs that holds the classes; found by default.
        ignore_label: a label that leaves its sample or position out; -100 always does.
        batch_axis: where samples stand in the data, see :class:`slrprop.data.Data`.
        settings: further settings of the method, see its settings class.

    Returns:
        The plan. Layers that the settings would not make smaller are left dense; ``left_dense`` says why.

    Raises:
        SlrpropError: bad settings, unknown layers, unusable data, a model with weights that are not finite.
    """
    opened = None if data is None else open_data(data, class_axis, ignore_label, batch_axis)
    problem = Problem(open_network(model, opened), opened)
    warn_if_compressed(model)
    return plan_problem(
        problem, method, layers, rank=rank, sparsity_rate=sparsity_rate, reduction_rate=reduction_rate, **settings
    )


def plan_problem(
    problem: Problem, /, method: str, layers: str | list[str] | tuple[str, ...] | None, **settings: Any
) -> Plan:
    """Like :func:`plan`, for a problem that may already know its decompositions, statistics and costs."""
    chosen = find_method(method)
    choices, network = settings_of(chosen, **settings), problem.network
    wanted, left_dense = treated(network, method, choices, layers)
    names = (*wanted, *left_dense)
    if not wanted and all(choices.refusal(*network.shape(name)) for name in names):
        reasons = ", ".join(f"{name}: {left_dense[name]}" for name in names)
        raise SlrpropError(f"{chosen.name} can treat none of the layers asked for ({reasons}); choose other settings")
    planned: dict[str, LayerPlan] = {}
    if wanted:
        problem.collect(wanted, tuple(need for need in choices.needs() if need in QUANTITIES))
        for decision in choices.decide(problem, wanted):
            layer = planned_layer(problem, decision, chosen, choices)
            size, before = network.stored(layer.name, layer.fit), network.stored(layer.name)
            if size < before or layer.name not in wanted:
                planned[layer.name] = layer
                left_dense.pop(layer.name, None)  # a head that is refitted
            else:
                left_dense[layer.name] = f"{method} would store {size:,} bytes instead of {before:,}"
        left_dense |= {name: f"{method} leaves it as it is" for name in wanted if name not in {*planned, *left_dense}}
    return finished(network, planned, left_dense)


def finished(network: Network, planned: Mapping[str, LayerPlan], left_dense: dict[str, str]) -> Plan:
    """The plan of these layers, in order of execution."""
    wanted = tuple(name for name in network.order if name in planned)
    return Plan(tuple(planned[name] for name in wanted), left_dense, network.junctions(wanted))


def planned_layer(problem: Problem, decision: Decision, method: Method, settings: Settings) -> LayerPlan:
    """A decision as the layer of a plan."""
    network = problem.network
    settings = (decision.settings or settings).at(network.operator(decision.name), network.shape(decision.name))
    fit, own = decision.fit, network.bias(decision.name)
    if settings.bits < 32 and not isinstance(fit.form, Quantized):
        fit = replace(fit, form=quantised(fit.form, settings.bits), bias=None if own is None else bias_in_few_bits(own))
    if not isinstance(fit.form, Quantized):
        dtype = network.weight(decision.name).dtype
        matrices = {key: matrix.to(dtype) for key, matrix in fit.form.matrices().items()}
        fit = replace(fit, form=fit.form.with_matrices(matrices))
    layer = LayerPlan(
        name=decision.name,
        shape=fit.form.shape,
        fingerprint=network.fingerprint(decision.name),
        method=decision.method or method.name,
        settings={name: getattr(settings, name) for name in settings.names()},
        numbers=fit.form.numbers,
        bytes=Fit(fit.form).bytes(network.itemsize(decision.name)),
        kept_rows="" if decision.kept_rows is None else pack(decision.kept_rows),
        kept_columns="" if decision.kept_columns is None else pack(decision.kept_columns),
        notes=fit.notes,
        fit=fit,
    )
    return layer.sealed() if not settings.rebuilt or isinstance(fit.form, Quantized) else layer


def settings_of(method: Method, /, **given: Any) -> Settings:
    """A method's settings; those of other methods' are ignored where all share their names.

    Raises:
        SlrpropError: an unknown name, or a bad value.
    """
    known = set(method.settings.names())
    shared = {"rank", "sparsity_rate", "reduction_rate"}
    for name in given:
        if name not in known and name not in shared:
            raise SlrpropError(
                f"method '{method.name}' has no setting '{name}'{suggestion(name, known)}; it has {', '.join(sorted(known))}"
            )
    return method.settings(**{name: value for name, value in given.items() if name in known})


@overload
def apply(model: nn.Module, plan: Plan) -> nn.Module: ...
@overload
def apply(
    model: str | Path,
    plan: Plan,
    output: str | Path,
    data: Any = None,
    integer_products: bool = False,
    batch_axis: Axes = None,
) -> Parity: ...
def apply(
    model: Model,
    plan: Plan,
    output: str | Path | None = None,
    data: Any = None,
    integer_products: bool = False,
    batch_axis: Axes = None,
) -> nn.Module | Parity:
    """A new model with the plan carried out; the original is untouched.

    Channels of ``plan.junctions`` that no layer reads go; the others are put in an order that makes every block of a sparse
    low-rank layer a slice.

    Args:
        model: a torch module, or the path of an ONNX file.
        output: for an ONNX file, where the new one is written.
        data: for an ONNX file, samples on which the new one's outputs are compared with those of the factors
            multiplied out; made-up inputs by default.
        integer_products: for an ONNX file, let ONNX Runtime multiply whole numbers in dense layers of 8 or 4 bits with 100 000 numbers
            or more, and in low-rank ones with a million: faster, but their inputs are rounded too (about 1 %; docs/quantisation.md).
        batch_axis: where samples stand in ``data``, see :class:`slrprop.data.Data`.

    Returns:
        The new module; or, for a file, how far its outputs are from the factors' mathematics.

    Raises:
        SlrpropError: the plan was made for another model (names, shapes and the weights' fingerprints are checked), the
            outputs differ, the file would be larger than the original, or something else stands in its place; nothing is
            written then.
    """
    if not isinstance(plan, Plan):
        raise SlrpropError(f"plan must be a slrprop plan, read from a file by Plan.load, got {type(plan).__name__}")
    if not isinstance(model, (str, Path)):
        no_integers(integer_products)
        return _apply_module(model, plan)
    if output is None:
        raise SlrpropError("an ONNX file was given, so apply needs the path of the file to write")
    file = OnnxFile.open(model)
    with together(*file.files, ("the data", data)) as outputs:
        file.places(output, outputs)
        network = OnnxNetwork(folded(file, plan.folded), None)
        done = _file_forms(network, plan)
        samples = None if data is None else open_data(data, batch_axis=batch_axis)
        return write(network, *done, output, samples, integer_products)


def no_integers(asked: bool) -> None:
    """Refuse integer products for a torch module."""
    if asked:
        raise SlrpropError("integer products are ONNX Runtime's; give the path of an ONNX file, or leave them out")


def realised(
    model: Model | OnnxFile, plan: Plan, integer_products: bool = False, sharing: bool = False
) -> nn.Module | OnnxFile:
    """The plan's network in memory: a module, or for an ONNX file the new file's content, not compared or written.

    Args:
        sharing: a module's other tensors are the original's, and not copied: for what is only looked at.
    """
    if isinstance(model, nn.Module):
        return _apply_module(model, plan, sharing)
    network = OnnxNetwork(folded(model, plan.folded), None)
    done = _file_forms(network, plan)
    return rewritten(network.file, done.moved, integer_products, done.orders)


class _Done(NamedTuple):
    """A plan carried out: ``moved`` are all layers that change once channels go or move, ``orders`` those that carriers have then."""

    fits: dict[str, Fit]
    moved: dict[str, Fit]
    orders: dict[str, Tensor]


def _file_forms(network: OnnxNetwork, plan: Plan) -> _Done:
    done = _carried_out(plan, network.names, network.weight, network.bias, network.fingerprint)
    for junction in plan.junctions:
        if any(name not in network.names or network.junction(name) != junction for name in junction.makers):
            raise SlrpropError(
                f"the plan says that {junction}, which it does not in this model; it was made for another model"
            )
    return done


def _apply_module(model: nn.Module, plan: Plan, sharing: bool = False) -> nn.Module:
    model = folded(model, plan.folded)
    modules = layer_modules(model)

    def weight(name: str) -> Tensor:
        return operator_of(modules[name]).matrix(weight_and_bias(modules[name])[0])

    def bias(name: str) -> Tensor | None:
        return weight_and_bias(modules[name])[1]

    done = _carried_out(plan, modules, weight, bias, lambda name: fingerprint(weight(name).T))
    swaps = {}
    for name, fit in done.moved.items():
        old, before = modules[name], weight(name)
        swaps[name] = layer_from(fit.over(bias(name)), operator_of(old)).to(before.dtype)
        if fit.form.shape != before.shape or original_shape(old) or computed_arrays(old):
            note_shape(swaps[name], original_shape(old) or before.shape)
    widths = {name: weight(junction.makers[0]).shape[1] for junction in plan.junctions for name in junction.carriers}
    swaps |= carried(model, widths, done.orders)
    return swapped(model, swaps, sharing)


def _carried_out(
    plan: Plan,
    names: Collection[str],
    weight: Callable[[str], Tensor],
    bias: Callable[[str], Tensor | None],
    digest: Callable[[str], str],
) -> _Done:
    for name in (*(layer.name for layer in plan.layers), *(name for part in plan.junctions for name in part.layers)):
        if name not in names:
            raise SlrpropError(
                f"the plan treats layer '{name}', which this model does not have{suggestion(name, names)}; it was made for another model"
            )
    for name, times in Counter(layer.name for layer in plan.layers).items():
        if times > 1:
            raise SlrpropError(f"the plan treats layer '{name}' twice; the file is damaged")
    fits = {layer.name: build(layer, weight(layer.name), digest(layer.name)) for layer in plan.layers}
    forms: dict[str, Form] = {name: fit.form for name, fit in fits.items()}
    forms, orders = arranged(forms, plan.junctions, lambda name: Dense(weight(name)))
    moved = {name: replace(fits.get(name, Fit(form)), form=form) for name, form in forms.items()}
    carriers = {name for junction in plan.junctions for name in junction.carriers}
    for name in orders.keys() - carriers:
        whole = moved[name].over(bias(name))
        moved[name] = whole if whole.bias is None else replace(whole, bias=whole.bias.taken(orders[name]))
    if plan.is_damaged():
        raise SlrpropError(
            "the plan is damaged: it differs from its checksum; plan again, or take 'sha256' out of a file that you edited"
        )
    return _Done(fits, moved, {name: orders[name] for name in carriers & orders.keys()})


def build(layer: LayerPlan, weight: Tensor, digest: str) -> Fit:
    """What a planned layer is given, from the model's weight (m x n), of this SHA-256, where the plan came from a file.

    Raises:
        SlrpropError: the plan was made for another weight, or is damaged.
    """
    if layer.shape != tuple(weight.shape):
        raise SlrpropError(
            f"the plan's layer '{layer.name}' is {layer.shape[0]} x {layer.shape[1]}, this model's is {weight.shape[0]} x {weight.shape[1]}; it was made for another model"
        )
    if layer.fingerprint != digest:
        raise SlrpropError(
            f"the weights of layer '{layer.name}' differ from those the plan was made for; plan again for this model"
        )
    if layer.fit is not None:
        return layer.fit
    require_choice("the plan's method", layer.method, METHODS)
    method = METHODS[layer.method]
    if not method.settings.rebuilt or layer.settings.get("bits", 32) < 32:
        raise SlrpropError(
            f"the plan lacks the fitted factors of layer '{layer.name}'; the file is damaged, or its 'fitted' was taken out"
        )
    known = set(method.settings.names())
    if not known.issuperset(layer.settings):  # those that came later have their defaults
        raise SlrpropError(
            f"the plan's settings of layer '{layer.name}' are not those of method '{layer.method}'; the file is damaged"
        )
    built = method.settings(**layer.settings).build(weight.contiguous(), layer)
    if built.numbers != layer.numbers:
        raise SlrpropError(
            f"the plan says that layer '{layer.name}' takes {layer.numbers} numbers, its settings give {built.numbers}; the file is damaged"
        )
    return Fit(built)
