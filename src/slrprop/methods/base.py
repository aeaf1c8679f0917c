"""What a method is: frozen settings, one function that decides, one that builds the factors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from slrprop.checks import require_choice, require_rank
from slrprop.data import Data
from slrprop.errors import SlrpropError
from slrprop.factors import Factors
from slrprop.linalg import SOLVERS, SVD, Solver, truncated_svd
from slrprop.losses import LOSSES, LossName
from slrprop.network.torch import TorchNetwork
from slrprop.plan import LayerPlan
from slrprop.relevance.cost import Baseline, CostScores, cost_scores
from slrprop.relevance.simple import Scores, weight_scores
from slrprop.statistics import Statistics, collect


@dataclass(frozen=True, kw_only=True)
class Settings(ABC):
    """Settings that every method has.

    Args:
        rank: k, the number of singular triplets kept.
        solver: how the SVD is computed, see :func:`slrprop.linalg.truncated_svd`.
    """

    rank: int = 16
    solver: Solver = "auto"

    source: ClassVar[str]

    def __post_init__(self) -> None:
        require_rank(self.rank)
        if not callable(self.solver):
            require_choice("solver", self.solver, ("auto", *SOLVERS))

    @abstractmethod
    def stored_numbers(self, m: int, n: int) -> int:
        """Numbers that an m x n weight (m, n >= rank) takes under these settings."""

    def needs(self) -> tuple[str, ...]:
        """What the method must be told: any of ``statistics.QUANTITIES``, and ``cost``."""
        return ()

    def eligible(self, network: TorchNetwork) -> tuple[str, ...]:
        """The layers this method can treat, in order of execution."""
        return network.order


class Problem:
    """The arrays a method decides on: weights, their SVD, statistics and scores of the chosen layers."""

    def __init__(self, network: TorchNetwork, data: Data | None, layers: tuple[str, ...], settings: Settings) -> None:
        self.network, self.layers, self.settings = network, layers, settings
        self._data = data
        self._scored = network  # the network the costs are measured on
        self._compressed: dict[str, Factors] = {}
        self._svds: dict[str, SVD] = {}
        quantities = tuple(need for need in settings.needs() if need != "cost")
        self.statistics: dict[str, Statistics] = collect(network, layers, self.data, quantities) if quantities else {}

    @property
    def data(self) -> Data:
        """The calibration data."""
        if self._data is None:
            raise SlrpropError(
                f"these settings need calibration data ({', '.join(self.settings.needs())}), and none was given"
            )
        return self._data

    def svd(self, name: str) -> SVD:
        """The truncated SVD of a layer's weight at the settings' rank."""
        if name not in self._svds:
            self._svds[name] = truncated_svd(self.weight(name), self.settings.rank, self.settings.solver)
        return self._svds[name]

    def weight(self, name: str) -> Tensor:
        """A layer's original weight (m x n)."""
        return self.network.weight(name)

    def weight_scores(self, name: str) -> Scores:
        """Scores by magnitude of the original weight."""
        return weight_scores(self.weight(name))

    def activation_scores(self, name: str) -> Scores:
        """Scores by mean activation."""
        return Scores(self.statistics[name]["input_abs"], self.statistics[name]["output_abs"])

    def cost(self, name: str, reduced_rank: int, baseline: Baseline, loss: LossName | None) -> CostScores:
        """Exact costs of shortening single neurons."""
        return cost_scores(self._scored, self.data, name, self.svd(name), reduced_rank, baseline, loss)

    def compress_now(self, name: str, factors: Factors) -> None:
        """From here on costs are measured with this layer already compressed."""
        self._compressed[name] = factors
        self._scored = self.network.with_weights(
            {key: form.dense() for key, form in self._compressed.items()}, self.data
        )


class Decision(NamedTuple):
    """A layer's factors, and the masks of neurons that keep the full rank where some do not."""

    name: str
    factors: Factors
    kept_rows: Tensor | None = None
    kept_columns: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A registered method; ``decide`` yields one decision per layer, ``build`` rebuilds factors from a saved plan."""

    name: str
    settings: type[Settings]
    decide: Callable[[Problem], Iterator[Decision]]
    build: Callable[[Tensor, LayerPlan, Any], Factors]

    @property
    def source(self) -> str:
        """The publication."""
        return self.settings.source

    @property
    def summary(self) -> str:
        """The first line of the settings' docstring."""
        return (self.settings.__doc__ or "").strip().split("\n")[0]

    @property
    def needs(self) -> tuple[str, ...]:
        """What it must be told at its default settings."""
        return self.settings().needs()


def require_loss(loss: str | None) -> None:
    """A loss by name, or None to find it."""
    if loss is not None:
        require_choice("loss", loss, LOSSES)
