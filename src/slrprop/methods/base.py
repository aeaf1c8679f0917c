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
from slrprop.network.base import Network
from slrprop.plan import LayerPlan
from slrprop.relevance.cost import Baseline, CostScores, cost_scores
from slrprop.relevance.simple import Scores, weight_scores
from slrprop.statistics import collect


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
        object.__setattr__(self, "rank", int(self.rank))  # numpy's numbers are no JSON
        if not callable(self.solver):
            require_choice("solver", self.solver, ("auto", *SOLVERS))

    @abstractmethod
    def stored_numbers(self, m: int, n: int) -> int:
        """Numbers that an m x n weight (m, n >= rank) takes under these settings."""

    def needs(self) -> tuple[str, ...]:
        """What the method must be told: any of ``statistics.QUANTITIES``, and ``cost``."""
        return ()

    def eligible(self, network: Network) -> tuple[str, ...]:
        """The layers this method can treat, in order of execution."""
        return network.order


class Problem:
    """What methods decide on: the arrays of one network on one calibration set, each computed once.

    The same problem can be put to many methods and settings; decompositions, statistics and costs are kept.
    """

    def __init__(self, network: Network, data: Data | None) -> None:
        self.network = network
        self._data = data
        self._svds: dict[tuple[Any, ...], SVD] = {}
        self._statistics: dict[tuple[str, str], Tensor] = {}
        self._costs: dict[tuple[Any, ...], CostScores] = {}

    @property
    def data(self) -> Data:
        """The calibration data."""
        if self._data is None:
            raise SlrpropError("these settings need calibration data, and none was given")
        return self._data

    def weight(self, name: str) -> Tensor:
        """A layer's original weight (m x n)."""
        return self.network.weight(name)

    def svd(self, name: str, rank: int, solver: Solver) -> SVD:
        """The truncated SVD of a layer's weight: part of a larger one where that is known."""
        key = (name, solver)
        if key not in self._svds or len(self._svds[key].s) < rank:
            self._svds[key] = truncated_svd(self.weight(name), rank, solver)
        u, s, vt = self._svds[key]
        return SVD(u[:, :rank].contiguous(), s[:rank], vt[:rank].contiguous())

    def collect(self, layers: tuple[str, ...], quantities: tuple[str, ...]) -> None:
        """Measure what is missing of these quantities, for all these layers in one pass."""
        missing = tuple(need for need in quantities if any((name, need) not in self._statistics for name in layers))
        if missing:
            for name, found in collect(self.network, layers, self.data, missing).items():
                self._statistics |= {(name, need): found[need] for need in missing}

    def weight_scores(self, name: str) -> Scores:
        """Scores by magnitude of the original weight."""
        return weight_scores(self.weight(name))

    def activation_scores(self, name: str) -> Scores:
        """Scores by mean activation; the quantities were collected."""
        return Scores(self._statistics[name, "input_abs"], self._statistics[name, "output_abs"])

    def cost(
        self,
        name: str,
        rank: int,
        solver: Solver,
        reduced_rank: int,
        baseline: Baseline,
        loss: LossName | None,
        compressed: dict[str, Factors] | None = None,
    ) -> CostScores:
        """Exact costs of shortening single neurons, where asked with other layers already ``compressed``."""
        svd = self.svd(name, rank, solver)
        if compressed:
            network = self.network.with_weights({key: form.dense() for key, form in compressed.items()}, self.data)
            return cost_scores(network, self.data, name, svd, reduced_rank, baseline, loss)
        key = (name, rank, solver, reduced_rank, baseline, loss)
        if key not in self._costs:
            self._costs[key] = cost_scores(self.network, self.data, name, svd, reduced_rank, baseline, loss)
        return self._costs[key]


class Decision(NamedTuple):
    """A layer's factors, and the masks of neurons that keep the full rank where some do not."""

    name: str
    factors: Factors
    kept_rows: Tensor | None = None
    kept_columns: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A registered method.

    ``decide(problem, layers, settings)`` yields one decision per layer; ``build(weight, layer_plan, settings)`` rebuilds
    the factors of a saved plan.
    """

    name: str
    settings: type[Settings]
    decide: Callable[[Problem, tuple[str, ...], Any], Iterator[Decision]]
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
