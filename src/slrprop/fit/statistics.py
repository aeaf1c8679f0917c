"""What calibration measured of a layer: streamed, accumulated in float64, in one pass or in parts that are merged."""

import itertools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Self

import torch
from scipy.linalg.blas import dsyrk
from torch import Tensor, nn

from slrprop.data import Data
from slrprop.linalg import mirrored
from slrprop.network import open_network
from slrprop.network.base import Network
from slrprop.operators import Lookup
from slrprop.parallel import each

QUANTITIES = ("input_abs", "output_abs")


def collect(
    network: Network, names: tuple[str, ...], data: Data, needs: Collection[str]
) -> dict[tuple[str, str], Tensor]:
    """The needed ``QUANTITIES`` of the named layers in one pass over the data, by layer and quantity.

    Sums over the calibration samples (each call and token of the layer is one): ``input_abs`` (m,) of ``|x|``; ``output_abs`` (n,) of ``|y|``
    after the layer's nonlinearity.
    """
    sums: dict[tuple[str, str], Tensor] = {}
    for flow in network.stream(names, data):
        for name, need in itertools.product(flow.calls, needs):
            for x, y in flow.calls[name]:
                if need == "input_abs" and isinstance(network.operator(name), Lookup):
                    total = reads(x, network.shape(name)[0])
                else:
                    values = x if need == "input_abs" else network.activated(name, y)
                    total = values.abs().sum(0, dtype=torch.float64)
                sums[name, need] = sums.get((name, need), 0) + total
    return sums


def reads(x: Tensor, m: int) -> Tensor:
    """How often each of m rows is read by numbers (p,): the sum of rows with a single one."""
    return x.cpu().long().remainder(m).bincount(minlength=m).double()


class Moments:
    """Count, means and centred sums of second moments of pairs (x, z), so summed that little cancels.

    ``mean`` (m,) and ``target_mean`` (n,); ``cross`` (m x n) is the sum of ``(x - mean) (z - target_mean)^T``, None where it is not asked
    for. All float64. Parts are put together by the update of Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    def __init__(self, m: int, n: int, crossed: bool = True) -> None:
        self.count = 0
        self.mean, self.target_mean = (torch.zeros(size, dtype=torch.float64) for size in (m, n))
        self._upper = torch.zeros(m, m, dtype=torch.float64)  # what is below the diagonal means nothing
        self.cross = torch.zeros(m, n, dtype=torch.float64) if crossed else None

    @property
    def square(self) -> Tensor:
        """The sum of ``(x - mean) (x - mean)^T`` (m x m)."""
        return mirrored(self._upper.clone())

    def add(self, x: Tensor, z: Tensor) -> None:
        """Take in a batch, (p x m) and (p x n)."""
        if not len(x):
            return
        x, z = x.double().cpu(), z.double().cpu()
        mean, target_mean = x.mean(0), z.mean(0)
        x = x - mean
        # in place, through transposed views: LAPACK's lower triangle of columns is our upper one of rows
        dsyrk(1.0, x.numpy().T, beta=1.0, c=self._upper.numpy().T, overwrite_c=1, lower=1)
        if self.cross is not None:
            self.cross.addmm_(x.T, z - target_mean)
        self._move(len(x), mean, target_mean)

    def merge(self, other: Self) -> None:
        """Take in what another part of the data has summed to."""
        if not other.count:
            return
        self._upper += other._upper
        if self.cross is not None and other.cross is not None:
            self.cross += other.cross
        self._move(other.count, other.mean, other.target_mean)

    def _move(self, count: int, mean: Tensor, target_mean: Tensor) -> None:
        """From sums about each part's own mean to those about the common one."""
        total = self.count + count
        by, target_by = mean - self.mean, target_mean - self.target_mean
        weight = self.count * (count / total)
        self._upper.addr_(by, by, alpha=weight)
        if self.cross is not None:
            self.cross.addr_(by, target_by, alpha=weight)
        self.mean += by * (count / total)
        self.target_mean += target_by * (count / total)
        self.count = total


class Counts:
    """How often each row of an embedding is read: the second moments of rows with a single one, all of which are on the diagonal."""

    def __init__(self, m: int) -> None:
        self.count, self.rows = 0, torch.zeros(m, dtype=torch.float64)

    def add(self, x: Tensor, z: Tensor) -> None:
        """Take in the numbers (p,) that rows were read by."""
        self.count += len(x)
        self.rows += reads(x, len(self.rows))

    def merge(self, other: Self) -> None:
        """Take in what another part of the data has counted."""
        self.count, self.rows = self.count + other.count, self.rows + other.rows


def summed_of(network: Network, name: str, crossed: bool) -> Moments | Counts:
    """What takes in the rows of a layer, empty yet."""
    m, n = network.shape(name)
    return Counts(m) if isinstance(network.operator(name), Lookup) else Moments(m, n, crossed)


def moments(
    model: nn.Module | str | Path,
    names: tuple[str, ...],
    parts: Iterable[Any],
    workers: int = 1,
    cluster: str | None = None,
) -> dict[str, Moments | Counts]:
    """Moments of the named layers' inputs and pre-activations, each part of the data streamed by one worker.

    Hand them to :class:`slrprop.fit.calibration.Calibration` as what is known of the original network.

    Args:
        model: a torch module, or the path of an ONNX file that every worker sees.
        parts: each a :class:`Data` or what makes one; paths of ``.npz`` files are opened by the worker.
        workers: processes, and ``cluster`` a Ray cluster, that share the parts (:func:`slrprop.parallel.each`).

    Raises:
        SlrpropError: a name is no layer of the model.
    """
    found: dict[str, Moments | Counts] = {}
    for _, part in each(_moments, parts, (model, names), workers, cluster):
        for name, summed in part.items():
            if name in found:
                found[name].merge(summed)  # type: ignore[arg-type]
            else:
                found[name] = summed
    return found


def _moments(part: Any, model: nn.Module | str | Path, names: tuple[str, ...]) -> dict[str, Moments | Counts]:
    data = part if isinstance(part, Data) else Data(part)
    network = open_network(model, data)
    for name in names:
        network.require(name)
    return moments_of(network, names, data)


def moments_of(
    network: Network,
    names: tuple[str, ...],
    data: Data,
    crossed: bool = True,
    outputs: dict[str, list[Tensor]] | None = None,
) -> dict[str, Moments | Counts]:
    """Moments of the named layers in one run of the data.

    Args:
        crossed: those of inputs with pre-activations too.
        outputs: the pre-activations (p x n) of every call are put here.
    """
    found = {name: summed_of(network, name, crossed) for name in names}
    for flow in network.stream(names, data, whole=False):
        for name, calls in flow.calls.items():
            for x, z in calls:
                found[name].add(x, z)
                if outputs is not None:
                    outputs.setdefault(name, []).append(z.cpu())
    return found
