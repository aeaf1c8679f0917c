"""One sentence for every kind of bad setting, and for an extra that is not installed."""

import importlib
import sys
from collections.abc import Callable, Collection
from dataclasses import fields
from difflib import get_close_matches
from functools import cache, partial
from numbers import Integral, Real
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from slrprop.errors import SlrpropError


def number(kind: Any, told: str, holds: Callable[[Any], bool]) -> Callable[[str, Any], Any]:
    """What refuses all but numbers of a kind for which something holds, in the words told; numpy's are made Python's, which JSON takes."""

    def check(what: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
            raise SlrpropError(f"{what} must be {told}, got {value!r}")
        return int(value) if kind is Integral else float(value)

    return check


require_rate = number(Real, "at least 0 and below 1", lambda rate: 0 <= rate < 1)
require_density = number(Real, "above 0 and at most 1", lambda density: 0 < density <= 1)  # or a share that stays
require_positive = number(Real, "a number above 0", lambda value: 0 < value <= sys.float_info.max)


def require_count(what: str, value: Any, least: int) -> int:
    """A count is a whole number from ``least``."""
    return int(number(Integral, f"a whole number from {least}", lambda count: count >= least)(what, value))


def require_seed(seed: Any) -> int:
    """A seed is a whole number from 0 to 2^63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        told = "a longer one" if isinstance(seed, int) and abs(seed) >= 2**128 else repr(seed)[:40]
        raise SlrpropError(f"seed must be a whole number from 0 to 2^63 - 1, got {told}")
    return int(seed)


def require_flag(what: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise SlrpropError(f"{what} must be True or False, got {value!r}")
    return value


def require_choice(what: str, value: Any, choices: Collection[str]) -> str:
    """A word out of a list."""
    if not isinstance(value, str) or value not in choices:
        raise SlrpropError(
            f"{what} must be one of {', '.join(choices)}, got {value!r}" + suggestion(str(value), choices)
        )
    return value


def suggestion(name: str, known: Collection[str]) -> str:
    """``; did you mean ...?`` where a known name is near."""
    near = get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def share(count: int, rate: float) -> int:
    """``int(count * rate)`` as the articles write it, safe from 0.29 * 100 = 28.999..."""
    return int(count * rate + 1e-9)


def need_extra(module: str, extra: str) -> Any:
    """Import a module of an optional extra.

    Raises:
        SlrpropError: it is not installed; the sentence names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("slrprop"):
            raise
        raise SlrpropError(
            f"this command needs the package '{error.name}'; install it with: pip install 'slrprop[{extra}]'"
        ) from error


Times = Annotated[int, partial(require_count, least=0)]
Count = Annotated[int, partial(require_count, least=1)]
Rate = Annotated[float, require_rate]
Density = Annotated[float, require_density]
Positive = Annotated[float, require_positive]
Seed = Annotated[int, lambda what, value: require_seed(value)]
_hints = cache(partial(get_type_hints, include_extras=True))


def hold(settings: Any) -> None:
    """Hold the fields of a frozen dataclass to their annotations: words of a ``Literal``, a bool, what an ``Annotated`` checks, or None besides.

    The second part of an ``Annotated`` takes a field's name and value and gives the value to keep, or raises.
    """
    hints = _hints(settings.__class__)
    for field in fields(settings):
        object.__setattr__(settings, field.name, _held(hints[field.name], field.name, getattr(settings, field.name)))


def _held(hint: Any, what: str, value: Any) -> Any:
    options = get_args(hint)
    if type(None) in options:
        return None if value is None else _held(options[0], what, value)
    if get_origin(hint) is Literal:
        return require_choice(what, value, options)
    if get_origin(hint) is Annotated:
        return options[1](what, value)
    return require_flag(what, value) if hint is bool else value
