"""Convolutions between fewer channels, fitted to calibration data."""

import math

import torch

from slrprop.checks import Density, Times
from slrprop.fit.regression import Regression
from slrprop.fit.sides import Sides
from slrprop.forms import Tucker
from slrprop.linalg import reduced_rank
from slrprop.methods.calibrated import CalibratedSettings
from slrprop.operators import Convolution, Operator


class TuckerSettings(CalibratedSettings):
    """A convolution between fewer channels: 1 x 1 in front, the kernel, 1 x 1 behind, each fitted to what comes before it.

    Args:
        keep: share of the input and of the output channels that the kernel goes between.
        sweeps: how often the first convolution is fitted anew to the others, and these to it.
    """

    keep: Density = 0.5
    sweeps: Times = 1
    kernel: tuple[int, ...] = (3, 3)

    source = "Kim et al., ICLR 2016 (Tucker-2); the refit: slrprop, 2026"
    weighs = True
    rungs = ("keep", tuple(step / 20 for step in range(1, 17)))

    def treats(self, operator: Operator) -> bool:
        return super().treats(operator) and isinstance(operator, Convolution) and operator.unit > 1

    def channels(self, m: int, n: int) -> tuple[int, int, int]:
        """Places of the kernel, and the channels that it goes between."""
        unit = math.prod(self.kernel)
        return unit, max(1, round(self.keep * m / unit)), max(1, round(self.keep * n))

    def stored_numbers(self, m: int, n: int) -> int:
        unit, inputs, outputs = self.channels(m, n)
        return m // unit * inputs + inputs * unit * outputs + outputs * n

    def fit(self, task: Regression) -> Tucker:
        """The input channels from those that matter most; behind them a low-rank regression."""
        m, n = task.weight.shape
        unit, inputs, outputs = self.at(task.operator, (m, n)).channels(m, n)
        sides = Sides.of(task, 1, unit)
        first = sides.start(inputs)
        for turn in range(self.sweeps + 1):
            inner = sides.between(first)
            core, last = reduced_rank(sides.second(first, inner), inner, task.root, outputs)
            if turn < self.sweeps:
                first = torch.linalg.qr(sides.first(first, core @ last))[0]  # another basis of the same channels
        size = (core.norm(dim=0) / last.norm(dim=1)).clamp(1e-8, 1e8).sqrt()
        return Tucker(task.operator.kernel, first, core / size, size[:, None] * last)
