"""Methods that fit a layer's factors to calibration data: what they share."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from slrprop.fit.pairs import Compressed
from slrprop.fit.quantize import bias_in_few_bits, quantised
from slrprop.fit.regression import Regression
from slrprop.forms import Bias, Dense, Fit, Form
from slrprop.memory import bound, give_back
from slrprop.methods.base import METHOD_OF, Decision, Method, Problem, Settings
from slrprop.operators import Lookup
from slrprop.plan import LayerPlan

Fitting = Callable[[Regression, Any], Form | Fit]  # a fit's bias was fitted together with its form


class CalibratedSettings(Settings):
    """Settings of every method that fits factors to data.

    Args:
        sequential: calibrate each layer on the outputs of the layers already compressed, not on the original ones.
        bias_correction: a new bias makes each layer's mean output right.
        refit_head: where the network's last layer stays dense and comes after a planned one, its weight is refitted to the
            original outputs by least squares, on its inputs of the compressed network.
    """

    sequential: bool = True
    bias_correction: bool = True
    refit_head: bool = True

    weighs: ClassVar[bool] = False
    by_settings: ClassVar[bool] = True  # whether they alone say how a planned layer is fitted once more

    @property
    def weighted(self) -> bool:
        """Whether errors of the outputs are weighed by what they do to the network's outputs: as ``sensitivity`` says, where there is such a setting."""
        return bool(getattr(self, "sensitivity", self.weighs))

    def needs(self) -> tuple[str, ...]:
        return ("inputs", "sensitivity") if self.weighted else ("inputs",)

    def parts(self, task: Regression) -> tuple[Tensor, Tensor] | None:
        """Factors (m x k) and (k x n) whose first j components are the product of rank j for every j up to this rank, if it is so."""
        return None

    @classmethod
    def method(cls) -> "CalibratedMethod":
        return CalibratedMethod(cls.called(), cls)

    def decide(self, problem: Problem, layers: tuple[str, ...]) -> Iterator[Decision]:
        """One layer after the other in order of execution, see :func:`in_order`."""
        method = METHOD_OF[self.called()]
        assert isinstance(method, CalibratedMethod)
        yield from in_order(problem, dict.fromkeys(layers, (method, self)))

    def fit(self, task: Regression) -> Form | Fit:
        """One layer's factors (float)."""
        raise NotImplementedError

    @classmethod
    def fit_of(cls, layer: LayerPlan) -> Fitting:
        """What fits a planned layer once more."""
        return fit_by_settings


def fit_by_settings(task: Regression, settings: Any) -> Form | Fit:
    """What the settings alone say."""
    found: Form | Fit = settings.fit(task)
    return found


@dataclass(frozen=True)
class CalibratedMethod(Method):
    """A method whose ``fit(task, settings)`` gives one layer's factors (float)."""

    settings: type[CalibratedSettings]
    fit: Fitting = fit_by_settings

    def anew(self, layer: LayerPlan) -> "CalibratedMethod":
        """The method to fit a planned layer once more."""
        return replace(self, fit=self.settings.fit_of(layer))


def in_order(
    problem: Problem,
    chosen: Mapping[str, tuple[CalibratedMethod, CalibratedSettings]],
    fixed: Mapping[str, LayerPlan] | None = None,
) -> Iterator[Decision]:
    """Fit layers one after the other in order of execution, each by its own method and settings.

    Args:
        fixed: layers that are compressed already and stay as they are.
    """
    compressed, order = dict[str, Compressed](), problem.network.order
    for name, layer in (fixed or {}).items():
        assert layer.fit is not None
        compressed[name] = Compressed.of(layer.fit.over(problem.network.bias(name)))
    names = [name for name in order if name in chosen]
    fitted = tuple(name for name in names if not problem.network.operator(name).bits_only)
    given = [settings for _, settings in chosen.values()]
    sequential = any(settings.sequential for settings in given)
    problem.calibration.prepare(fitted, any(settings.weighted for settings in given), not sequential)
    try:
        for name in names:
            method, settings = chosen[name]
            settings = settings.at(problem.network.operator(name), problem.network.shape(name))
            before = {key: value for key, value in compressed.items() if order.index(key) < order.index(name)}
            decision, compressed[name] = fit_layer(problem, name, method, settings, before)
            yield decision
            if len(names) > 1:  # else whoever asks for one layer after the other does
                give_back()
        all_given = [*map(vars, given), *(layer.settings for layer in (fixed or {}).values())]
        wanted = all(one.get(key, True) for one in all_given for key in ("refit_head", "sequential"))
        last = head_after(problem, [*names, *(fixed or {})]) if wanted else None
        if last is not None:
            task = problem.calibration.regression(last, compressed, weighted=False)
            dtype = problem.weight(last).dtype
            weight = task.weight.to(dtype).contiguous()
            fit = Fit(Dense(weight), Bias(task.corrected_bias(weight.double()).to(dtype)))
            yield Decision(last, fit, method="dense", settings=METHOD_OF["dense"].settings(bits=32))
    finally:
        problem.calibration.rest()


def head_after(problem: Problem, names: list[str]) -> str | None:
    """The network's last layer, if it comes after these, is none of them, and can be given another weight."""
    network = problem.network
    last = next((name for name in network.order if network.is_last(name)), None)
    first = min((network.order.index(name) for name in names), default=len(network.order))
    fit = last is not None and last not in names and network.order.index(last) > first
    return last if fit and last and network.layers[last].calls == 1 and not network.stays(last) else None


def fit_layer(
    problem: Problem,
    name: str,
    method: CalibratedMethod,
    settings: CalibratedSettings,
    compressed: Mapping[str, Compressed],
) -> tuple[Decision, Compressed]:
    """One layer's factors, rounded if so asked, and its bias; and what it computes by now. All on the CPU."""
    if problem.network.operator(name).bits_only:  # every number by itself
        own = problem.network.bias(name)
        fit = Fit(quantised(Dense(problem.weight(name)), settings.bits), None if own is None else bias_in_few_bits(own))
        return Decision(name, fit), Compressed.of(fit)
    before = compressed if settings.sequential else {}
    task = problem.calibration.regression(name, before, settings.weighted)
    dtype = problem.weight(name).dtype
    key = (name, method.fit, replace(settings, bits=32))  # the same form in several widths is fitted once
    anew = before or task.weight.nbytes > bound() // 8
    fitted = method.fit(task, settings) if anew else problem.once(key, partial(method.fit, task, settings))
    form, bias, notes = (fitted.form, fitted.bias, fitted.notes) if isinstance(fitted, Fit) else (fitted, None, {})
    if bias is not None:  # a solution in itself: rounding is to come near to it, not to the weight it was fitted to
        task = replace(task, weight=form.dense())
    # the mean output that the bias is to give, whatever rounding does to the form; None: the bias stays as it is
    mean = task.target_mean if settings.bias_correction else None
    if bias is not None and mean is None:
        mean = bias.value + task.mean @ form.dense()
    if isinstance(task.operator, Lookup):  # which adds nothing
        mean = None
    if settings.bits < 32:
        form = quantised(form, settings.bits, task)
    else:
        form = form.with_matrices({key: matrix.to(dtype).contiguous() for key, matrix in form.matrices().items()})
    value = task.bias if mean is None else mean - task.mean @ form.dense().double()
    if settings.bits < 32 and (mean is not None or problem.network.bias(name) is not None):
        bias = bias_in_few_bits(value)
    else:
        bias = None if mean is None else Bias(value.to(dtype))
    fit = Fit(form, bias, notes)
    return Decision(name, fit), Compressed.of(fit.over(task.bias))
