"""Which inputs drive which outputs: information control while a network learns, and its collapse into one matrix (Kamimura 2020).

The articles' formulas are not available to us: what is here is a reconstruction, and where it could be read two ways both are offered.
The collapse by gradients (:func:`collapse`, ``by="gradients"``) is ours.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from slrprop.checks import require_choice, require_count, require_density
from slrprop.errors import SlrpropError, first_line
from slrprop.network.torch.find import layer_modules, weight_and_bias
from slrprop.research.likeness import Likeness, References, compare, correlation, effects
from slrprop.research.matrix import collapse, collapse_alike

__all__ = [
    "InformationControl", "Likeness", "References", "collapse", "collapse_alike", "compare", "correlation", "cost", "effects",
    "potentiality", "selective_information",
]  # fmt: skip
SCHEDULES = ("raise", "lower", "alternate")


def potentiality(weight: Tensor) -> Tensor:
    """``|w|`` over the largest of the layer: 1 for its strongest connection, 0 for one that is none.

    >>> potentiality(torch.tensor([[1.0, -4.0], [0.0, 2.0]]))
    tensor([[0.2500, 1.0000],
            [0.0000, 0.5000]])
    """
    size = weight.detach().abs()
    return size / size.max().clamp_min(torch.finfo(size.dtype).tiny)


def selective_information(weight: Tensor, complement: bool = False) -> float:
    """The sum of a layer's potentialities: about how many of its connections count. It *falls* as the layer becomes selective.

    Args:
        complement: the sum of ``1 - potentiality`` instead, the other reading, which rises.
    """
    g = potentiality(weight)
    return float((1 - g if complement else g).double().sum())


def cost(weight: Tensor) -> float:
    """The sum of ``|w|``."""
    return float(weight.detach().abs().double().sum())


def give_weight(name: str, module: nn.Module, weight: Tensor) -> None:
    """Change in place what a layer's weight, as torch stores it, is or is computed from, so that it becomes this one.

    Raises:
        SlrpropError: the layer computes another one, whatever it is given; it stays as it was.
    """
    before, held = copy.deepcopy(module.state_dict()), {**module._parameters, **module._buffers}
    with torch.no_grad():
        try:
            if is_parametrized(module, "weight"):
                module.weight = weight
            for stored in (held.get(key) for key in ("weight", "weight_orig", "weight_v")):
                if stored is not None:
                    stored.copy_(weight)
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, WeightNorm) and hook.name == "weight":
                    module.get_parameter("weight_g").copy_(torch.norm_except_dim(weight, 2, hook.dim))
            if not torch.allclose(weight_and_bias(module)[0], weight, 1e-2, 1e-3 * float(weight.abs().max())):
                raise ValueError("it comes out as another one")
        except Exception as error:  # somebody else's parametrisation may have no inverse
            module.load_state_dict(before)
            raise SlrpropError(f"layer '{name}' computes its weight, and can't be given another one ({first_line(error)}); take its parametrisation away first") from error  # fmt: skip


class InformationControl:
    """Changes a network's dense weights between ordinary steps of training, so that few connections count, or many.

    *raise* (selectivity): ``w <- theta g w``, g the potentiality. *lower*: ``w <- theta (1 - g) w``, rescaled so that the layer's cost
    becomes theta times what it was. *alternate*: the one, then the other. Call :meth:`step` after each ordinary step:

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> control = InformationControl(model, "alternate", every=10)
    >>> done = [control.step() for _ in range(20)]  # each behind an optimizer's step
    >>> done[9], done[19]
    ('raise', 'lower')

    Args:
        model: its ``nn.Linear`` layers are changed in place, those behind a weight norm or a pruning mask too.
        schedule: one of these, or a function from the number of the control step (0, 1, ...) to ``raise``, ``lower`` or ``none``.
        every: ordinary steps for one of control.
        theta: below 1 it forces the cost down.
        strength: the power of g (or 1 - g), in (0, 1]: 1 as in the article, less changes less.

    Raises:
        SlrpropError: another schedule, or a network without dense layers; at a step, a layer whose weight is computed so that it can't
            become a given one, like spectral norm's.
    """

    def __init__(
        self, model: nn.Module, schedule: str | Callable[[int], str] = "alternate", every: int = 1, theta: float = 1.0,
        strength: float = 1.0,
    ) -> None:  # fmt: skip
        if not callable(schedule):
            require_choice("schedule", schedule, SCHEDULES)
        require_count("every", every, 1)
        require_density("theta", theta)
        require_density("strength", strength)
        self.layers = {name: layer for name, layer in layer_modules(model).items() if isinstance(layer, nn.Linear)}
        if not self.layers:
            raise SlrpropError("the model has no nn.Linear layer whose information could be controlled")
        self._schedule, self.every, self.theta, self.strength = schedule, every, theta, strength
        self._steps = 0

    def step(self) -> str:
        """Count an ordinary step, and change the weights if it is time; what was done: ``raise``, ``lower`` or ``none``."""
        self._steps += 1
        turn, early = divmod(self._steps, self.every)
        if early:
            return "none"
        asked = self._schedule(turn - 1) if callable(self._schedule) else self._schedule
        what = ("raise", "lower")[(turn - 1) % 2] if asked == "alternate" else asked
        require_choice("what the schedule asks for", what, ("raise", "lower", "none"))
        if what != "none":  # all before any: a tied weight is changed once
            changed = {name: self._changed(weight_and_bias(layer)[0], what) for name, layer in self.layers.items()}
            for name, weight in changed.items():
                give_weight(name, self.layers[name], weight)
        return what

    def _changed(self, weight: Tensor, what: str) -> Tensor:
        g = potentiality(weight)
        changed = weight * (g if what == "raise" else 1 - g) ** self.strength
        if what == "lower":  # where all connections are equal, none of them can be lowered
            after = cost(changed)
            changed = changed * (cost(weight) / after) if after else weight
        return self.theta * changed

    def selective_information(self, complement: bool = False) -> float:
        """The sum over the layers."""
        return sum(selective_information(weight_and_bias(layer)[0], complement) for layer in self.layers.values())

    def cost(self) -> float:
        """The sum over the layers."""
        return sum(cost(weight_and_bias(layer)[0]) for layer in self.layers.values())
