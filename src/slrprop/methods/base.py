"""What a method is: frozen settings that decide what each layer becomes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from numbers import Integral
from typing import Annotated, Any, ClassVar, NamedTuple, Self, dataclass_transform

from torch import Tensor

from slrprop.checks import Count, Density, hold, number, require_choice
from slrprop.data import Data
from slrprop.errors import SlrpropError
from slrprop.fit.calibration import Calibration
from slrprop.fit.sparsity import whole_share
from slrprop.fit.statistics import QUANTITIES, collect
from slrprop.forms import Dense, Fit, Form
from slrprop.forms.quantized import BITS
from slrprop.linalg import SOLVERS, SVD, Solver, truncated_svd
from slrprop.network.base import Network
from slrprop.operators import Lookup, Operator
from slrprop.plan import LayerPlan
from slrprop.relevance.cost import CostScores, cost_scores
from slrprop.relevance.simple import Scores

METHOD_OF: "dict[str, Method]" = {}  # every method that was imported, by name
WIDEST = 1024  # neurons on a side, beyond which a fit to data takes seconds


Bits = Annotated[int, number(Integral, "32, 8 or 4", lambda bits: bits in (32, *BITS))]


def _solver(what: str, solver: Any) -> Any:
    return solver if callable(solver) else require_choice(what, solver, SOLVERS)


@dataclass_transform(kw_only_default=True, frozen_default=True)
@dataclass(frozen=True, kw_only=True)
class Settings(ABC):
    """Settings that every method has; annotations say what they may be (:func:`slrprop.checks.hold`). Subclasses are frozen dataclasses by themselves.

    Args:
        bits: of every stored number: 32 (as the layer's own), 8 or 4.
    """

    bits: Bits = 32

    source: ClassVar[str]
    rungs: ClassVar[tuple[str, tuple[float, ...]]] = ("", ())  # a setting, and values of it that a search may try

    coupled: ClassVar[bool] = False  # layers are treated together: one's factors make no sense without the others'
    rebuilt: ClassVar[bool] = False  # a saved plan's factors are built from the weight again, not saved with it

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)
        if "source" in vars(cls):  # settings with a source are those of the method of their module's name
            METHOD_OF[cls.called()] = cls.method()

    @classmethod
    def called(cls) -> str:
        """The method's name."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def method(cls) -> "Method":
        """The method with these settings."""
        return Method(cls.called(), cls)

    def decide(self, problem: "Problem", layers: tuple[str, ...]) -> "Iterator[Decision]":
        """A decision for each of these layers."""
        for name in layers:
            settings = self.at(problem.network.operator(name), problem.network.shape(name))
            yield Decision(name, Fit(settings.alone(problem, name)))

    def alone(self, problem: "Problem", name: str) -> Form:
        """The form of a layer that is decided on by itself."""
        raise NotImplementedError

    def build(self, weight: Tensor, layer: LayerPlan) -> Form:
        """The factors of a planned layer from its m x n weight, where they are ``rebuilt``."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        hold(self)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """What can be chosen; the ``kernel`` is the layer's own."""
        return tuple(field.name for field in fields(cls) if field.name != "kernel")

    @abstractmethod
    def stored_numbers(self, m: int, n: int) -> int | None:
        """Numbers that an m x n weight takes under these settings; None where the data decide."""

    @classmethod
    def ladder(cls, m: int, n: int) -> list[dict[str, Any]]:
        """Settings for an m x n weight that a search may try, from the smallest result to the largest."""
        return [{cls.rungs[0]: value} for value in cls.rungs[1]] or [{}]

    def refusal(self, m: int, n: int) -> str:
        """Why an m x n weight can't be treated; empty if it can."""
        return ""

    def needs(self) -> tuple[str, ...]:
        """What the method must be told: any of ``statistics.QUANTITIES``, ``cost``, ``inputs`` and ``sensitivity``."""
        return ()

    def treats(self, operator: Operator) -> bool:
        """Whether the method can treat a weight that is multiplied so."""
        return not operator.bits_only and not isinstance(operator, Lookup)

    def obstacle(self, network: Network, name: str) -> str:
        """What of a layer, or of what stands behind it, keeps the method from treating it, in words; empty where it is nothing of the kind."""
        kind = network.operator(name).bits_only
        return f"it is {kind}, which takes fewer bits and no other form" if kind else ""

    def at(self, operator: Operator, shape: tuple[int, int]) -> Self:
        """The settings for a layer of a shape (m, n), where these depend on it."""
        known = hasattr(self, "kernel") and operator.kernel
        return replace(self, kernel=operator.kernel) if known else self  # type: ignore[call-arg]

    def eligible(self, network: Network) -> tuple[str, ...]:
        """The layers this method can treat, in order of execution."""
        return tuple(name for name in network.order if self.treats(network.operator(name)))


class RankSettings(Settings):
    """Settings of methods that keep a rank.

    Args:
        rank: k, the number of components kept.
        compression_rate: stored numbers over original ones; in each layer the highest rank within it is taken instead of ``rank``.
    """

    rank: Count = 16
    compression_rate: Density | None = None

    def stored_numbers(self, m: int, n: int) -> int:
        return self.rank * (m + n)

    def at(self, operator: Operator, shape: tuple[int, int]) -> Self:
        found = super().at(operator, shape)
        if found.compression_rate is None:
            return found
        most = found.compression_rate * shape[0] * shape[1]
        rank, step = 0, 1 << 20
        while step:  # bisection: the numbers grow with the rank
            numbers = replace(found, rank=rank + step).stored_numbers(*shape)
            rank, step = rank + step * (numbers is not None and numbers <= most), step // 2
        return replace(found, rank=max(1, rank))

    def refusal(self, m: int, n: int) -> str:
        return f"rank {self.rank} is above its smaller side {min(m, n)}" if self.rank > min(m, n) else ""

    @classmethod
    def ladder(cls, m: int, n: int) -> list[dict[str, Any]]:
        return [{"rank": rank} for rank in ranks_for(m, n)]


class SVDBasedSettings(RankSettings):
    """Settings of methods that cut the weight's singular value decomposition.

    Args:
        solver: how it is computed, see :func:`slrprop.linalg.truncated_svd`.
    """

    solver: Annotated[Solver, _solver] = "auto"


class DensitySettings(Settings):
    """Settings of methods that keep single weights.

    Args:
        density: share of the weights kept.
    """

    density: Density = 0.1

    def stored_numbers(self, m: int, n: int) -> int:
        return whole_share(m * n, self.density)

    @classmethod
    def ladder(cls, m: int, n: int) -> list[dict[str, Any]]:
        """1/2, 3/8, 1/4, 3/16, ... down to one weight for two outputs, ascending."""
        halves = (0.5**power * share for power in range(1, 40) for share in (1.0, 0.75))
        return [{"density": density} for density in sorted(halves) if density * m * n >= n / 2]


class WholeSettings(Settings):
    """Settings of methods that keep every number, in few bits."""

    bits: Bits = 8

    def stored_numbers(self, m: int, n: int) -> int:
        return m * n

    def treats(self, operator: Operator) -> bool:
        return True


COARSE_ABOVE = 1024  # neurons on a side: half as many ranks from 16 on are tried
WIDE_RANKS = 256  # highest rank tried on layers with more than 2048 neurons on both sides


def grid(limit: int, coarse: bool = False) -> list[int]:
    """1, 2, ..., 8, 10, 12, 14, 16, 20, ... up to a limit: four steps to each power of two; ``coarse``: two from 16 on."""
    powers = (2**power for power in range(limit.bit_length()))
    steps = {power + power * part // 4 for power in powers for part in range(0, 4, 2 if coarse and power >= 16 else 1)}
    return sorted(step for step in steps if step <= limit)


def ranks_for(m: int, n: int) -> list[int]:
    """Ranks up to the break-even rank of an m x n layer."""
    limit = (m * n - 1) // (m + n)
    return grid(min(limit, WIDE_RANKS) if min(m, n) > 2048 else limit, max(m, n) > COARSE_ABOVE)


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
        self._last: dict[Any, Any] = {}

    @cached_property
    def calibration(self) -> Calibration:
        """The layers' regressions on the calibration data."""
        return Calibration(self.network, self.data)

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

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, which is not made again while its key is one of the last three."""
        if key not in self._last:
            self._last = dict([*self._last.items()][-2:]) | {key: make()}
        return self._last[key]

    def collect(self, layers: tuple[str, ...], quantities: tuple[str, ...]) -> None:
        """Measure what is missing of these quantities, for all these layers in one pass."""
        missing = tuple(need for need in quantities if any((name, need) not in self._statistics for name in layers))
        if missing:
            self._statistics |= collect(self.network, layers, self.data, missing)

    def activation_scores(self, name: str) -> Scores:
        """Scores by mean activation."""
        self.collect((name,), QUANTITIES)
        return Scores(*(self._statistics[name, need] for need in QUANTITIES))

    def cost(
        self, name: str, settings: Any, compressed: Mapping[str, Form] | None = None, inputs: bool = True
    ) -> CostScores:
        """Exact costs of shortening single neurons under a method's settings, of the outputs alone without ``inputs``.

        Args:
            settings: see :class:`slrprop.methods.slr.ShortenSettings`; by their order the other layers are ``compressed`` already.
        """
        svd, network = self.svd(name, settings.rank, settings.solver), self.network
        rest = settings.reduced_rank, settings.baseline, settings.loss
        if compressed and settings.order == "sequential":
            fits = {key: Fit(Dense(form.dense())) for key, form in compressed.items()}
            return cost_scores(network.with_fits(fits, self.data), self.data, name, svd, *rest, inputs)
        key = (name, settings.rank, settings.solver, *rest)
        if key not in self._costs or (inputs and not len(self._costs[key].rows)):
            self._costs[key] = cost_scores(network, self.data, name, svd, *rest, inputs)
        return self._costs[key]


class Decision(NamedTuple):
    """A layer's fit; the masks of neurons that keep the full rank where some do not.

    ``method`` is the one that was really used where it is another than asked for; ``settings`` likewise.
    """

    name: str
    fit: Fit
    kept_rows: Tensor | None = None
    kept_columns: Tensor | None = None
    method: str | None = None
    settings: "Settings | None" = None


@dataclass(frozen=True)
class Method:
    """A registered method: its name and what its settings are."""

    name: str
    settings: type[Settings]

    @property
    def coupled(self) -> bool:
        """Whether it treats layers together, see :class:`Settings`."""
        return self.settings.coupled

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
