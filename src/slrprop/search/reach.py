"""What a file can come down to at all: the arithmetic of a byte budget, without any fit."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from slrprop.methods import find_method
from slrprop.network import Network
from slrprop.search.path import Choice


class Reach(NamedTuple):
    """Bytes of the original file, those in none of the layers that are tried, and the least that any plan can take."""

    original: int
    untouched: int
    least: int
    kinds: str

    def __str__(self) -> str:
        kinds = f" (of all numbers' bytes: {self.kinds})" if self.kinds else ""
        return (
            f"of the original's {self.original:,} bytes {self.untouched:,} are in nothing that was to be made smaller{kinds}, and the "
            f"smallest forms of the other layers take {self.least - self.untouched:,} or more, {self.least:,} in all"
        )


def reach_of(network: Network, names: Collection[str], choices: Sequence[Choice], original: int) -> Reach:
    """The bounds of what these methods can make of these layers of a file of ``original`` bytes.

    Only the numbers of the forms count, not what the file has around them. Of a form whose numbers the data decide,
    or that may take neurons away from the layer before it, nothing is known.
    """
    dense = {name: network.stored(name) for name in names}
    untouched = original - sum(dense.values())
    least = sum(_smallest(network, name, choices, size) for name, size in dense.items())
    return Reach(original, untouched, untouched + least, network.other_numbers(names))


def _smallest(network: Network, name: str, choices: Sequence[Choice], dense: int) -> int:
    """Bytes of a layer's smallest form, its bias in 8 bits; of the dense one where none has a smaller weight."""
    (m, n), bias, own = network.shape(name), network.bias(name), 8 * network.itemsize(name)
    found = [m * n * own]
    for method, given in choices:
        kind = find_method(method).settings
        if not kind(**given).treats(network.operator(name)):
            continue
        steps = [kind(**{**step, **given}).at(network.operator(name), (m, n)) for step in kind.ladder(m, n)]
        if any(step.stored_numbers(m, n) is None or hasattr(step, "density") for step in steps):
            return 0
        found += [(step.stored_numbers(m, n) or 0) * min(step.bits, own) for step in steps]
    return dense if min(found) >= m * n * own else min(dense, min(found) // 8 + (0 if bias is None else bias.numel()))
