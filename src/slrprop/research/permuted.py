"""Dense layers whose columns are permutations of one sequence, put in the place of others and trained from scratch."""

import math
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from slrprop.checks import require_seed, suggestion
from slrprop.data import open_data
from slrprop.errors import SlrpropError
from slrprop.forms import Bias, Fit, Shared
from slrprop.network.torch.find import device_of, layer_modules
from slrprop.network.torch.modules import FactoredLayer
from slrprop.network.torch.network import main_output, swapped
from slrprop.progress import Progress


class PermutedLinear(FactoredLayer):
    """A linear layer to be trained from scratch: m + n numbers, a bias and a seed instead of m n numbers and a bias.

    The sequence starts as m normal numbers standardised to mean 0 and variance 1 / m, every scale as ``gain``, the bias as
    0, so that inputs with mean square 1 give outputs with mean square ``gain^2``. There is no offset per output: it would
    act on the sum of the inputs, m times as strongly as a bias.

    Args:
        seed: of the permutations (:func:`slrprop.forms.permutations.seeded`); the sequence comes from torch's own generator.
        bias: whether to add a bias.
        gain: 1 for a linear layer, sqrt(2) in front of a ReLU (He et al., ICCV 2015).
    """

    def __init__(self, in_features: int, out_features: int, seed: int, bias: bool = True, gain: float = 1.0) -> None:
        require_seed(seed)
        for what, side in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(side, bool) or not isinstance(side, int) or side < 1:
                raise SlrpropError(f"{what} must be a whole number from 1, got {side!r}")
        sequence = torch.randn(in_features)
        sequence = (sequence - sequence.mean()) / sequence.std(correction=0) if in_features > 1 else torch.ones(1)
        scale = torch.full((out_features,), float(gain))
        form = Shared(sequence / math.sqrt(in_features), scale, None, seed=seed)
        super().__init__(Fit(form, Bias(torch.zeros(out_features)) if bias else None))


def permute(model: nn.Module, layers: str | list[str] | tuple[str, ...] | None = None, seed: int = 0) -> nn.Module:
    """A copy of the model with fresh :class:`PermutedLinear` layers in the place of dense ones, to be trained.

    Args:
        model: untouched; the weights of the chosen layers are not used, all others are copied.
        layers: names or glob patterns; None for all dense layers (``nn.Linear``).
        seed: layer number i of the chosen ones, in the order of the modules, has its permutations from ``seed + i``.

    Raises:
        SlrpropError: no layer of that name, or none at all.
    """
    modules = {name: module for name, module in layer_modules(model).items() if isinstance(module, nn.Linear)}
    patterns = ["*"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise SlrpropError(
                f"no dense layer of the model is called '{pattern}'{suggestion(pattern, modules)}; it has {', '.join(modules) or 'none'}"
            )
    chosen = [name for name in modules if any(fnmatchcase(name, pattern) for pattern in patterns)]
    fresh: dict[str, nn.Module] = {}
    for index, name in enumerate(chosen):
        old = modules[name]
        new = PermutedLinear(old.in_features, old.out_features, seed + index, old.bias is not None, math.sqrt(2))
        fresh[name] = new.to(next(old.parameters()).dtype)
    return swapped(model, fresh)


def train(
    model: nn.Module, data: Any, epochs: int = 5, learning_rate: float = 3e-3, weight_decay: float = 0.01
) -> nn.Module:
    """Train a model in place on labels: AdamW, one-cycle learning rate, cross-entropy.

    Parameters that need no gradient (``requires_grad_(False)``) stay as they are. Afterwards the model is in evaluation mode.

    Args:
        data: samples with labels, anything :class:`slrprop.data.Data` takes; its batches are the steps, in its order: give a
            ``DataLoader`` with ``shuffle=True`` (arrays are read from first to last).

    Returns:
        The model.

    Raises:
        SlrpropError: no labels.
    """
    opened = open_data(data)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = epochs * sum(1 for _ in opened)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    with Progress(total=steps, unit="step") as bar:
        for _ in range(epochs):
            for batch in opened:
                if batch.targets is None:
                    raise SlrpropError("training needs labels, and the data has none; give (inputs, labels)")
                batch = batch.to(device_of(model))
                loss = nn.functional.cross_entropy(main_output(model(*batch.inputs, **batch.named)), batch.targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.eval()
