"""Distillation: a short fine-tuning of a plan's factors on the original network's outputs; labels are not needed.

The student's outputs come near to the teacher's in Kullback-Leibler divergence at a temperature (Hinton, Vinyals, Dean,
2015). Factors in few bits are rounded in every step, and the gradient passes the rounding as if it were not there; their
scales learn too (Esser et al., learned step size quantization, ICLR 2020). Samples are mixed (mixup, Zhang et al., ICLR 2018):
the original answers between the samples too, and says more there than where it was trained to be certain. The mixtures come
again after a few epochs, so that the original, which is much slower than the plan, answers each of them once.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from slrprop.checks import require_count, require_flag, require_positive, require_seed
from slrprop.data import Batch, Data, open_data
from slrprop.errors import SlrpropError
from slrprop.factors import Factors, Quantized
from slrprop.factors.quantized import CODES
from slrprop.losses import rows_of
from slrprop.network import Network, TorchNetwork, open_network
from slrprop.network.chain import ACTIVATIONS, Step
from slrprop.network.torch import evaluating, main_output, swapped
from slrprop.operators import MatMul, Operator
from slrprop.plan import LayerPlan, Plan
from slrprop.quantize import LARGEST, SMALLEST, rounded, with_bias

HELD_OUT = 0.1  # of the data, to choose the epoch by
LEAST = 10  # samples, of which one is held out
LEAST_HELD_OUT = 1000  # few are mixed with one another again and again
EPOCHS, LEAST_STEPS = 40, 1000
MIXTURES, LEAST_MIXED = 4, 2**15  # of all samples, then they come again; more of them where samples are few
KEPT = 2**30  # bytes of the original's answers; where they would take more it answers anew in every step
RATES = 1.0, 0.1  # of the learning rate, one after the other
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How factors are fine-tuned.

    Args:
        epochs: passes over the data, the best of which by the held-out divergence is kept (0 is the start); None: 40, and where
            samples are few and mixed as many as make 1 000 steps.
        learning_rate: of Adam in the first half of the epochs, decaying to zero by a cosine; the other half begins at the best so
            far with a tenth of it, which is what a plan needs that is good from the start.
        batch: samples per step.
        temperature: of the softmax of both networks.
        mixup: whether a half of the samples, on average, are mixed with another one, in shares drawn evenly, in the steps and those
            held out; inputs of whole numbers never are.
        seed: of the order of the samples and of the mixtures.
    """

    epochs: int | None = None
    learning_rate: float = 3e-3
    batch: int = 256
    temperature: float = 2.0
    mixup: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch",) if self.epochs is None else ("batch", "epochs"):
            require_count(name, getattr(self, name), 1)
        require_seed(self.seed)
        require_flag("mixup", self.mixup)
        for name in ("learning_rate", "temperature"):
            require_positive(name, getattr(self, name))


class Tunable(nn.Module):
    """A planned layer whose numbers learn; what is stored in few bits is rounded on the way.

    Args:
        bias: the original's.
        dtype: to learn in; inputs of another one are cast, and outputs cast back.
    """

    def __init__(
        self,
        layer: LayerPlan,
        bias: Tensor | None,
        dtype: torch.dtype = torch.float32,
        operator: Operator | None = None,
    ) -> None:
        super().__init__()
        form = layer.factors
        assert form is not None
        self.layer, self.dtype, self.operator = layer, dtype, operator or MatMul()
        self.bits = form.bits if isinstance(form, Quantized) else 32
        self.own_bias = isinstance(form, Quantized) and form.bias is not None
        plain = form.plain() if isinstance(form, Quantized) else form
        self.form = plain
        self.axes = plain.scale_axes()
        self.numbers = nn.ParameterDict(
            {name: nn.Parameter(matrix.detach().to(dtype, copy=True)) for name, matrix in plain.matrices().items()}
        )
        scales = form.scales if isinstance(form, Quantized) else {}
        self.scales = nn.ParameterDict({name: nn.Parameter(scale.to(dtype).log()) for name, scale in scales.items()})
        start = (
            form.bias
            if isinstance(form, Quantized) and self.own_bias
            else layer.bias
            if layer.bias is not None
            else bias
        )
        self.bias = (
            None if start is None else nn.Parameter(start.detach().to(next(iter(self.numbers.values())), copy=True))
        )

    def _scale(self, name: str) -> Tensor:
        scale = self.scales[name].exp()
        scale = scale + (_stored(scale).to(scale) - scale).detach()
        return scale if self.numbers[name].ndim == 1 else scale.unsqueeze(self.axes[name])

    def now(self) -> Factors:
        """The factors at this step, rounded where they will be; differentiable."""
        if self.bits == 32:
            return self.form.with_matrices(dict(self.numbers.items()))
        low, high = CODES[self.bits]
        made = {}
        for name, matrix in self.numbers.items():
            scale = self._scale(name)
            ratio = matrix / scale
            made[name] = (ratio + (ratio.round() - ratio).detach()).clamp(low, high) * scale
        return self.form.with_matrices(made)

    def _bias(self) -> Tensor | None:
        """The bias, rounded where it will be."""
        if self.bias is None or not self.own_bias or not self.bias.abs().max() < LARGEST:  # too long steps
            return self.bias
        codes, scale = rounded(self.bias.detach().double(), 0, 8)
        return self.bias + ((codes * scale).to(self.bias) - self.bias).detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.operator.compute(self.now(), self._bias(), x.to(self.dtype)).to(x.dtype)

    def finished(self) -> LayerPlan:
        """The layer's plan with the tuned factors."""
        self.cpu()
        with torch.no_grad():
            like = self.form.matrices()
            bias = None if self.bias is None else self.bias.detach().to(next(iter(like.values())).dtype, copy=True)
            if self.bits == 32:
                form: Factors = self.form.with_matrices(
                    {name: matrix.detach().to(like[name].dtype, copy=True) for name, matrix in self.numbers.items()}
                )
                return replace(self.layer, factors=form, bias=bias).sealed()
            low, high = CODES[self.bits]
            scales = {name: _stored(scale.exp()) for name, scale in self.scales.items()}
            codes = {}
            for name, matrix in self.numbers.items():
                scale = scales[name].float()
                wide = scale if matrix.ndim == 1 else scale.unsqueeze(self.axes[name])
                codes[name] = (matrix / wide).round().clamp(low, high).float()
            form = Quantized(self.form.with_matrices(codes), scales, self.bits)
            form = with_bias(form, bias) if self.own_bias and bias is not None else form
            return replace(self.layer, factors=form, bias=None if self.own_bias else bias).sealed()


def _stored(scale: Tensor) -> Tensor:
    """A scale as it is stored."""
    return scale.detach().clamp(SMALLEST, LARGEST).half()


def tune(model: Any, data: Any, plan: Plan, settings: TuneSettings | None = None) -> Plan:
    """:func:`distilled` for a torch module or the path of an ONNX file, on anything that :class:`slrprop.data.Data` takes."""
    if not isinstance(plan, Plan):
        raise SlrpropError(f"tune takes a plan that slrprop.plan made, got {type(plan).__name__}")
    opened = open_data(data)
    return distilled(open_network(model, opened), opened, plan, settings)


def distilled(
    network: Network, data: Data, plan: Plan, settings: TuneSettings | None = None, quiet: bool = False
) -> Plan:
    """A plan whose factors were tuned on the original network's outputs.

    Where a chain of dense layers and activations leads from the first planned layer to the output, only that chain is run.

    Args:
        network: the original.
        data: inputs; a tenth is held out to stop by. Labels are ignored.
        plan: with its factors in memory.

    Raises:
        SlrpropError: the plan treats no layer; an ONNX network has no such chain; too few samples.
    """
    chosen = settings or TuneSettings()
    if not plan.layers or any(layer.factors is None for layer in plan.layers):
        raise SlrpropError("there is nothing to tune: the plan treats no layer, or was read without its factors")
    names = [layer.name for layer in plan.layers]
    layers = {}
    for layer in plan.layers:
        weight = network.weight(layer.name)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        layers[layer.name] = Tunable(layer, network.bias(layer.name), dtype, network.operator(layer.name)).to(
            weight.device
        )
    entry = require_tunable(network, data, names)
    student: Forward
    teacher: Forward
    if entry is not None:
        inputs = torch.cat([x for flow in network.stream((entry,), data) for x, _ in flow.calls[entry]])
        student, teacher = _along(network, entry, layers), _along(network, entry, {})
    else:
        assert isinstance(network, TorchNetwork)
        inputs, like = _whole_inputs(data).to(network.device), next(iter(data))
        with evaluating(network.model):  # the copy stays in that mode
            student = _whole(network, swapped(network.model, dict(layers)), like)
        teacher = evaluating(network.model)(_whole(network, network.model, like))
    targets = network.numbered(next(iter(data)).targets)
    notes = _distil(
        student, teacher, inputs, nn.ModuleList(layers.values()), chosen, quiet,
        lambda outputs: network.real_valued(targets, outputs),
    )  # fmt: skip
    done = [layers[layer.name].finished() for layer in plan.layers]
    return replace(plan, layers=tuple(replace(layer, notes=layer.notes | notes) for layer in done), sha256="")


def require_tunable(network: Network, data: Data, names: Sequence[str]) -> str | None:
    """Refuse to tune layers where that can't be done; the first of them, if a chain leads from it over all others to the output."""
    entry = _entry(network, names)
    if entry is None and not isinstance(network, TorchNetwork):
        reached = next((names[i:] for i in range(1, len(names)) if _entry(network, names[i:])), ())
        raise SlrpropError(
            f"tuning needs a chain of dense layers from '{names[0]}' to the output, which this ONNX graph has not; "
            + (f"name the layers that have one ({', '.join(reached)}), " if reached else "")
            + "tune the torch module, or use the calibrated level"
        )
    if entry is None:
        _only_input(next(iter(data)))
        rows: Iterable[int] = (batch.samples for batch in data)
    else:
        rows = (len(x) for flow in network.stream((entry,), data, whole=False) for x, _ in flow.calls[entry])
    count = 0
    for count in itertools.accumulate(rows):
        if count >= LEAST:
            return entry
    raise SlrpropError(
        f"tuning needs {LEAST} samples or more (compress tunes on a third of the data), got {count}; give more data"
    )


def _entry(network: Network, names: Sequence[str]) -> str | None:
    """The first planned layer, if a chain leads from it over all others to the output."""
    first = next(name for name in network.order if name in names)
    chain = network.chain(first)
    reached = {first} if chain is None else {first, *(step.name for step in chain.steps)}
    return first if chain is not None and chain.is_plain(network.weight) and set(names) <= reached else None


def _along(network: Network, first: str, layers: Mapping[str, Tunable]) -> Forward:
    """The network from the inputs of a layer on, with these layers in place of the original ones."""
    chain = network.chain(first)
    assert chain is not None
    bias = network.bias(first)
    weight = network.weight(first)
    like = chain.scale
    start = Step("identity", weight.to(like), like.new_zeros(len(like)) if bias is None else bias.to(like), first)

    def run(x: Tensor) -> Tensor:
        x = x.to(like)
        for step in (start, *chain.steps):
            layer = layers.get(step.name or "")
            x = step(x) if layer is None else layer(ACTIVATIONS[step.activation](x))
        return x

    return run


def _whole(network: TorchNetwork, model: nn.Module, like: Batch) -> Forward:
    axis, place = like.axes.get(0, 0), network.place(like)
    return lambda x: network.classes_last(network.scores(main_output(model(x.movedim(0, axis))).movedim(place, 0)))


def _whole_inputs(data: Data) -> Tensor:
    """The only input of all batches, its samples on the first axis."""
    return torch.cat([_only_input(batch).movedim(batch.axes.get(0, 0), 0) for batch in data])


def _only_input(batch: Batch) -> Tensor:
    if len(batch.inputs) != 1 or batch.named:
        raise SlrpropError("a network without a chain of dense layers can be tuned on data with one input only; use the calibrated level")  # fmt: skip
    only: Tensor = batch.inputs[0]
    return only


def _distil(
    student: Forward, teacher: Forward, inputs: Tensor, layers: nn.ModuleList, chosen: TuneSettings, quiet: bool,
    real_valued: Callable[[Tensor], bool],
) -> dict[str, float]:  # fmt: skip
    """Train the layers in place; what was reached."""
    count = len(inputs)
    held = int(count * HELD_OUT)
    random = torch.Generator().manual_seed(chosen.seed)
    order = torch.randperm(count, generator=random)
    aside, rest = order[:held], order[held:]
    mixing = chosen.mixup and inputs.is_floating_point()

    def mixtures(places: Tensor, ways: int) -> tuple[Tensor, Tensor]:
        """So many partners and shares of theirs for each of these samples (ways x p)."""
        partners = torch.stack([places[torch.randperm(len(places), generator=random)] for _ in range(ways)])
        shares = torch.rand(partners.shape, generator=random)
        return partners, shares * (torch.rand(partners.shape, generator=random) < 0.5)

    def mixed(places: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
        x = inputs[places]
        return x.lerp(inputs[partners], shares.to(x).reshape(-1, *[1] * (x.ndim - 1))) if mixing else x

    def answers(run: Forward, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([rows_of(run(part)) for part in x.split(1024)])

    ways = -(-LEAST_HELD_OUT // held) if mixing else 1
    held_inputs = torch.cat([mixed(aside, *way) for way in zip(*mixtures(aside, ways), strict=True)])
    wanted = answers(teacher, held_inputs)
    numbers = real_valued(wanted[:1])

    def held_out() -> float:
        return float(distance(answers(student, held_inputs), wanted, 1.0, numbers))

    best = before = held_out()
    kept, reached, epoch = copy.deepcopy(layers.state_dict()), 0, 0
    an_epoch = -(-len(rest) // chosen.batch)
    epochs = chosen.epochs or max(EPOCHS, -(-LEAST_STEPS // an_epoch) if mixing else 0)
    ways = min(max(MIXTURES, -(-LEAST_MIXED // len(rest))), epochs) if mixing else 1
    partners, shares = mixtures(rest, ways)
    known = _kept(teacher, held_inputs, wanted, ways, len(rest))
    with tqdm(
        total=epochs * an_epoch, desc="tuning", unit="step", mininterval=1, disable=True if quiet else None
    ) as bar:
        for rate, passes in zip(RATES, (epochs - epochs // 2, epochs // 2), strict=True):
            layers.load_state_dict(kept)
            optimizer = torch.optim.Adam(layers.parameters(), rate * chosen.learning_rate, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, passes * an_epoch))
            for done in range(1, passes + 1):
                way = epoch % ways
                for places in torch.randperm(len(rest), generator=random).split(chosen.batch):
                    x = mixed(rest[places], partners[way, places], shares[way, places])
                    if known is not None and epoch >= ways:
                        target = known[way, places].flatten(0, 1)
                    else:
                        target = answers(teacher, x)
                        if known is not None:
                            known[way, places] = target.reshape(len(places), *known.shape[2:])
                    loss = distance(rows_of(student(x)), target, chosen.temperature, numbers)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
                epoch += 1
                if done % max(1, epochs // EPOCHS) and done < passes:
                    continue  # so many held-out samples would take longer than the few that it learns from
                found = held_out()
                if found < best:
                    best, kept, reached = found, copy.deepcopy(layers.state_dict()), epoch
    layers.load_state_dict(kept)
    return {"tuned_epochs": float(reached), "divergence_before": before, "divergence_after": best}


def _kept(teacher: Forward, x: Tensor, wanted: Tensor, ways: int, count: int) -> Tensor | None:
    """Room for the original's answers to ``count`` samples in so many ways; None where it takes too much, or an output is of no sample of its own.

    Args:
        x, wanted: some samples and the rows that it answers (:func:`slrprop.losses.rows_of`).
    """
    each = wanted.numel() * wanted.element_size() // len(x)
    probe = x[:7]
    with torch.no_grad():
        by_sample = len(teacher(probe)) == len(probe)
    if not by_sample or ways * count * each > KEPT:
        return None
    return wanted.new_empty(ways, count, len(wanted) // len(x), wanted.shape[1])


def distance(outputs: Tensor, wanted: Tensor, temperature: float, real_valued: bool = False) -> Tensor:
    """Mean divergence of outputs (p x c) from the wanted ones; the mean squared distance of real-valued or single ones."""
    if real_valued or outputs.shape[1] < 2:
        return (outputs - wanted).square().mean()
    log_q, log_p = (wanted / temperature).log_softmax(-1), (outputs / temperature).log_softmax(-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
