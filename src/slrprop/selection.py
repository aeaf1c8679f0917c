"""Which layers a method treats, and why others stay as they are."""

from fnmatch import fnmatchcase
from typing import Any

from slrprop.errors import SlrpropError
from slrprop.methods import Settings
from slrprop.network.base import Network

LARGEST = 1e75  # weights whose squares, weighed by other squares, are numbers in double precision


def treated(
    network: Network, method: str, settings: Settings, layers: str | list[str] | tuple[str, ...] | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The layers asked for that a method may treat, in order of execution; why the others stay as they are."""
    names, exact = _select(network, layers, settings, method)
    reasons = {name: _why_dense(network, name, settings, must=name in exact) for name in names}
    left_dense = {name: reason for name, reason in reasons.items() if reason}
    return tuple(name for name in network.order if name in names and name not in left_dense), left_dense


def _select(network: Network, layers: Any, settings: Settings, method: str) -> tuple[tuple[str, ...], set[str]]:
    """The layers asked for in order of execution, and those of them that were named, not matched."""
    eligible = settings.eligible(network)
    if layers is None:
        if not eligible:
            told, reasons = network.other_numbers(), {name: settings.obstacle(network, name) for name in network.order}
            listed = ", ".join(f"{name} ({reason})" if reason else name for name, reason in reasons.items())
            raise SlrpropError(
                f"method '{method}' treats none of the layers {listed} of this model; choose another"
                if network.order
                else "the model has no layer (dense, convolution or embedding; in ONNX with a constant weight of real numbers) that is called "
                f"on this data{f'; its numbers are elsewhere: {told}' if told else ''}"
            )
        return eligible, set()
    patterns = [layers] if isinstance(layers, str) else layers
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise SlrpropError(f"layers must be a name, a pattern or a list of them, got {layers!r}")
    names, exact = list[str](), {pattern for pattern in patterns if pattern in network.names}
    for pattern in patterns:
        matches = [pattern] if pattern in exact else [name for name in network.names if fnmatchcase(name, pattern)]
        if not matches:
            network.require(pattern)
        names += matches
    for name in exact:
        network.require(name)
        if name not in eligible:
            reason = settings.obstacle(network, name)
            told = f" ({reason})" if reason else ""
            raise SlrpropError(
                f"method '{method}' can't treat layer '{name}'{told}; on this model it treats {', '.join(eligible) or 'none'}"
            )
    selected = tuple(name for name in eligible if name in names)
    if not selected:
        raise SlrpropError(
            f"none of the layers asked for ({', '.join(patterns) or 'none'}) can be treated by method '{method}'; it treats {', '.join(eligible)}"
        )
    return selected, exact


def _why_dense(network: Network, name: str, settings: Settings, must: bool) -> str:
    """Why a layer must stay as it is; empty if it need not. ``must``: the user named it, so some reasons are errors."""
    (m, n), settings = network.shape(name), settings.at(network.operator(name), network.shape(name))
    if reason := network.stays(name):
        if must:
            untie = "untie them first, or " if network.layers[name].tied else ""
            raise SlrpropError(f"layer '{name}' can't be factored: {reason}; {untie}leave it out")
        return reason
    weight = network.weight(name)
    largest = float(weight.abs().max())
    told = f"its weights go up to {largest:.0e}, beyond what can be squared" if largest > LARGEST else ""
    if reason := settings.refusal(m, n) or told:
        if must:
            raise SlrpropError(f"layer '{name}' ({m} x {n}) can't be treated: {reason}; choose other settings")
        return reason
    numbers, own = settings.stored_numbers(m, n), 8 * network.itemsize(name)
    if numbers is None or numbers * min(settings.bits, own) < m * n * own:
        return ""
    size = ", ".join(f"{key} {getattr(settings, key)}" for key in ("rank", "density") if hasattr(settings, key))
    return f"{size or 'it'} would store {numbers:,} numbers instead of {m * n:,}"
