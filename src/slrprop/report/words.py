"""Numbers and plans in words, the same in both kinds of report."""

import math
import shlex
from collections.abc import Sequence

from slrprop.metrics import PERCENT
from slrprop.plan import SIZES, LayerPlan, unpack, wording

CRITERIA = {
    "weight": "sum of the weights' magnitudes",
    "activation": "mean activation",
    "cost": "change of the loss when the neuron is shortened",
}
# of a command, with their values
REPLACED = ("--max-drop", "--max-bytes", "--max-latency", "--max-latency-ms", "--report")


def size(count: int) -> str:
    """Bytes, exact and rounded."""
    short = short_size(count)
    return f"{count:,} bytes" if short.endswith(" B") else f"{count:,} bytes ({short})"


def short_size(count: float) -> str:
    """Bytes to three digits."""
    for unit, value in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= value:
            return f"{count / value:.3g} {unit}" if count < 999.5 * value else f"{count / value:,.0f} {unit}"
    return f"{count:,.0f} B"


def milliseconds(seconds: float) -> str:
    """A latency, or nothing where it was not measured."""
    return "" if math.isnan(seconds) else f"{1e3 * seconds:.3g} ms"


def times(before: float, after: float, word: str) -> str:
    """``13.8 times smaller``; nothing where it is not so."""
    return f"{before / after:.3g} times {word}" if after > 0 and before > 1.005 * after else ""


def quality(metric: str, *values: float, unit: str = "%") -> str:
    """A value of the metric with its unit, or several: ``-0.21 to 0.88 points``."""
    told = " to ".join(f"{value:.2f}" if metric in PERCENT else f"{value:.4g}" for value in values)
    return f"{told} {unit}" if metric in PERCENT else told


def drop(metric: str, *values: float) -> str:
    """A difference of two values of the metric, or the ends of its interval."""
    return "not known" if math.isnan(values[0]) else quality(metric, *values, unit="points")


def criterion(name: str) -> str:
    """What a relevance is."""
    return " + ".join(CRITERIA.get(part, part) for part in name.split("+"))


def form(layer: LayerPlan | None) -> str:
    """A layer's plan in a few words."""
    return "left dense" if layer is None else wording(layer)


def settings(layer: LayerPlan) -> str:
    """The settings that are not told elsewhere."""
    told = {*SIZES, "bits", "shape", "variant"}
    return ", ".join(f"{key}={value}" for key, value in layer.settings.items() if key not in told and value is not None)


def kept(layer: LayerPlan | None) -> tuple[list[bool], list[bool]] | None:
    """The rows and columns at full rank, where the method makes a difference between neurons."""
    if layer is None or not (layer.kept_rows and layer.kept_columns):
        return None
    m, n = layer.shape
    return unpack(layer.kept_rows, m).tolist(), unpack(layer.kept_columns, n).tolist()


def command_for(command: str | Sequence[str], count: int) -> str:
    """The command line that gives a file of at most ``count`` bytes: the given one with another budget."""
    given = shlex.split(command) if isinstance(command, str) else list(command)
    words = given or ["slrprop", "compress", "MODEL", "--calibration", "DATA", "-o", "OUT"]
    found: list[str] = []
    skip = False
    for word in words:
        name, _, value = word.partition("=")
        if skip or name in REPLACED or word == "--confident":
            skip = not skip and name in REPLACED and not value
            continue
        found.append(word)
    outputs = [at for at, word in enumerate(found) if word in ("-o", "--output") or word.startswith("--output=")]
    at = outputs[0] if outputs else len(found)
    return shlex.join([*found[:at], "--max-bytes", str(count), *found[at:]])
