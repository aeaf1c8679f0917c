"""What candidates take in time: forms of each layer measured beside the dense one, for budgets on latency."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from slrprop.forms import Dense, Form, Quantized
from slrprop.latency import layer_latencies
from slrprop.network import Network
from slrprop.network.layer import Layer
from slrprop.operators import Lookup
from slrprop.search.judge import Log
from slrprop.search.path import Candidate, Cost, group_of, undominated
from slrprop.search.result import Budget

TOGETHER = 8  # forms that are timed in one run


class Times:
    """The seconds that forms of layers take for one sample, each kind of layer and form measured once.

    Args:
        integers: whole numbers are multiplied as they are; else forms of equal arrays take the same time whatever their bits.
    """

    def __init__(self, network: Network, log: Log, integers: bool = False) -> None:
        self.network, self.log, self.integers = network, log, integers
        # by layer: the dense weight's seconds (""), and of these the shares that other forms take
        self._known: dict[str, dict[str, float]] = {}

    def of(self, name: str, curve: Sequence[Candidate]) -> list[Candidate]:
        """A layer's candidates, with the seconds of those that run no slower than the dense one.

        Those that others beat both in bytes and in numbers are not timed. What has no factors yet stands between timed forms of its method.
        """
        layer = self.network.layers[name]
        if layer.operator.bits_only or isinstance(layer.operator, Lookup):
            return [replace(candidate, seconds=0.0) for candidate in curve]  # unpacked when a file is loaded
        dense = Dense(self.network.weight(name).detach().float().cpu())
        numbers = {id(c): dense.numbers if c.layer is None else c.layer.numbers for c in curve}
        least = [curve[0], *undominated(curve), *undominated(curve, lambda c: numbers[id(c)])]
        forms = {id(c): form for c in least if (form := dense if c.layer is None else c.layer.factors) is not None}
        keys = {place: self._key(form) for place, form in forms.items()}
        shares = self._shares(layer, dense, {keys[place]: form for place, form in forms.items()})
        seconds = {place: shares[""] * layer.calls * (shares[key] if key else 1.0) for place, key in keys.items()}
        timed: dict[tuple[str, int, str], list[tuple[int, float]]] = {}
        for c in curve[1:]:
            if id(c) in keys and c.layer is not None:
                timed.setdefault(group_of(c.layer), []).append((numbers[id(c)], seconds[id(c)]))
        for c in curve[1:]:
            if c.layer is not None and c.formless and group_of(c.layer) in timed:
                seconds[id(c)] = float(np.interp(numbers[id(c)], *np.array(sorted(timed[group_of(c.layer)])).T))
        slow = {place for place, taken in seconds.items() if not taken <= seconds[id(curve[0])]}
        return [replace(c, seconds=math.nan if id(c) in slow else seconds.get(id(c), math.nan)) for c in curve]

    def _key(self, form: Form) -> str:
        """What tells forms of different speed apart; nothing for the dense weight."""
        plain = form.codes if isinstance(form, Quantized) else form
        bits = str(form.bits) if self.integers and isinstance(form, Quantized) else ""
        if isinstance(plain, Dense) and not bits:
            return ""
        return " ".join([plain.kind, bits, *(str(tuple(matrix.shape)) for matrix in plain.matrices().values())])

    def _shares(self, layer: Layer, dense: Dense, forms: Mapping[str, Form]) -> dict[str, float]:
        told = f"{layer.operator} {layer.shape} {layer.positions}"
        known = self._known.setdefault(told, {})
        missing = [key for key in forms if key and key not in known]
        for start in range(0, len(missing), TOGETHER) if missing or known else (0,):
            chunk = {"": dense, **{key: forms[key] for key in missing[start : start + TOGETHER]}}
            key = hashlib.sha256(f"{told} {self.integers} {list(chunk)}".encode()).hexdigest()
            measure = partial(layer_latencies, chunk, layer.operator, layer.positions, self.integers)
            times = self.log.get(key, measure)
            known |= {"": times[""]} | {form: taken / times[""] for form, taken in times.items() if form}
        return known


def cost_of(budget: Budget, original: int) -> Cost:
    """What a candidate takes of a budget on latency, as a share of it; of bytes too where they are limited or, for a drop, to be few."""
    assert budget.max_latency is not None
    limit, bytes_count = budget.max_latency, budget.max_bytes is not None or budget.max_drop is not None
    most = budget.max_bytes or original
    return lambda candidate: candidate.seconds / limit + bytes_count * candidate.bytes / most
