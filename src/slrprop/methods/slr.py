"""SLR, sparse low rank: less relevant neurons keep fewer ranks."""

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal

from torch import Tensor

from slrprop.checks import Rate, require_choice, share
from slrprop.fit.statistics import QUANTITIES
from slrprop.forms import Fit, Form, SparseLowRank
from slrprop.linalg import truncated_svd
from slrprop.losses import LossName
from slrprop.methods.base import Decision, Problem, SVDBasedSettings
from slrprop.plan import LayerPlan, unpack
from slrprop.relevance.cost import Baseline
from slrprop.relevance.simple import Scores, by_channel, combined, highest, weight_scores

CRITERIA = ("weight", "activation", "cost", "cost+weight", "cost+activation")


class ShortenSettings(SVDBasedSettings):
    """Settings of every method that shortens neurons.

    Args:
        sparsity_rate: share of the inputs, and of the outputs, that are shortened.
        reduction_rate: share of the rank that a shortened neuron keeps.
        baseline: loss that costs are measured from: of the ``truncated`` (authors' SLR code) or ``original`` network.
        order: ``independent`` measures each layer's costs with the other layers original; ``sequential``, from the
            last layer back, with the later ones already compressed.
        loss: ``cross_entropy``, ``kl`` or ``squared``; None finds it from the data.
    """

    sparsity_rate: Rate = 0.5
    reduction_rate: Rate = 0.5
    baseline: Baseline = "truncated"
    order: Literal["independent", "sequential"] = "independent"
    loss: LossName | None = None

    rebuilt = True

    @property
    def reduced_rank(self) -> int:
        """The rank that a shortened neuron keeps."""
        return share(self.rank, self.reduction_rate)

    def stored_numbers(self, m: int, n: int) -> int:
        short = share(m, self.sparsity_rate) + share(n, self.sparsity_rate)
        return self.rank * (m + n - short) + self.reduced_rank * short

    def needs(self) -> tuple[str, ...]:
        return ("cost",)

    def build(self, weight: Tensor, layer: LayerPlan) -> SparseLowRank:
        svd = truncated_svd(weight, self.rank, self.solver)
        rows, columns = map(unpack, (layer.kept_rows, layer.kept_columns), layer.shape)
        return SparseLowRank.shorten(svd, self.reduced_rank, ~rows, ~columns)


class SLRSettings(ShortenSettings):
    """SLR: the less relevant neurons of both sides keep only part of the rank.

    Args:
        criterion: what a neuron's relevance is: ``weight``, ``activation``, ``cost``, or a sum of two.
    """

    criterion: Annotated[str, partial(require_choice, choices=CRITERIA)] = "cost"

    source = "Swaminathan, Garg, Kannan, Andres, Neurocomputing 398, 2020"

    def needs(self) -> tuple[str, ...]:
        cost = ("cost",) if "cost" in self.criterion else ()
        return cost + (QUANTITIES if "activation" in self.criterion else ())

    def decide(self, problem: Problem, layers: tuple[str, ...]) -> Iterator[Decision]:
        """Every layer by itself, from the last to the first."""
        compressed: dict[str, Form] = {}
        for name in reversed(layers):
            settings = self.at(problem.network.operator(name), problem.network.shape(name))
            decision = shortened(problem, name, settings, scores_of(problem, name, settings, compressed))
            compressed[name] = decision.fit.form
            yield decision


def kept(scores: Tensor, sparsity_rate: float) -> Tensor:
    """Mask of the neurons that keep the full rank: all but the lowest share; ties fall to the lower index."""
    return highest(scores, len(scores) - share(len(scores), sparsity_rate))


def channels_of(problem: Problem, name: str) -> int:
    """How many channels a layer reads: inputs of a dense one."""
    return problem.network.shape(name)[0] // problem.network.operator(name).unit


def kept_of(problem: Problem, name: str, settings: ShortenSettings, scores: Scores) -> tuple[Tensor, Tensor]:
    """Masks of a layer's inputs (m,), in whole channels, and outputs (n,) that keep the full rank."""
    rows, columns = (kept(side, settings.sparsity_rate) for side in scores)
    return rows.repeat_interleave(problem.network.operator(name).unit), columns


def shortened(problem: Problem, name: str, settings: ShortenSettings, scores: Scores) -> Decision:
    """Shorten a layer's least relevant neurons."""
    rows, columns = kept_of(problem, name, settings, scores)
    svd = problem.svd(name, settings.rank, settings.solver)
    form = SparseLowRank.shorten(svd, settings.reduced_rank, ~rows, ~columns)
    return Decision(name, Fit(form), rows, columns)


def scores_of(problem: Problem, name: str, settings: SLRSettings, compressed: dict[str, Form] | None = None) -> Scores:
    """A layer's relevances by the criterion."""
    parts = []
    for part in settings.criterion.split("+"):
        if part == "cost":
            cost = problem.cost(name, settings, compressed)
            parts.append(Scores(cost.rows, cost.columns))
        else:
            found = weight_scores(problem.weight(name)) if part == "weight" else problem.activation_scores(name)
            parts.append(Scores(by_channel(found.rows, channels_of(problem, name)), found.columns))
    return parts[0] if len(parts) == 1 else combined(*parts)
