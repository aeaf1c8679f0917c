"""The one exception class of slrprop, text that a terminal takes as it is, and numbers that JSON takes."""

import math
import re
from typing import Any


class SlrpropError(ValueError):
    """A request that cannot be met: one sentence with what was asked, what was seen and what to do; it tells no password."""

    def __init__(self, sentence: str) -> None:
        # it names layers, files and URLs, which may hold anything
        super().__init__(without_passwords(printable(sentence)))


def without_passwords(text: str) -> str:
    """The text with ``***`` for the passwords of URLs, and for values that are called so."""
    text = re.sub(r"://(?!user:password@host/name)([^\s:@/]*):\S*@", r"://\1:***@", text)
    return re.sub(r"(?i)((?:password|passwd|pwd|secret|token)=)('[^']*'|[^&\s']+)", r"\1***", text)


class SlrpropWarning(UserWarning):
    """What was done is hardly what was meant."""


def first_line(error: BaseException) -> str:
    """The first line of what another library raised, for one sentence of our own."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def printable(text: str) -> str:
    """The text on one line, its control, bidirectional and other invisible characters escaped as Python writes them."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def finite(value: Any) -> Any:
    """A value for JSON: numbers that are infinite or none become null, and ``why_null`` beside them says of each why."""
    if isinstance(value, dict):
        reasons = {key: why for key, part in value.items() if (why := _why_null(part))}
        return {key: finite(part) for key, part in value.items()} | ({"why_null": reasons} if reasons else {})
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if _why_null(value) else value


def _why_null(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return next(filter(None, map(_why_null, value)), "")
    return "" if not isinstance(value, float) or math.isfinite(value) else "not known" if value != value else "infinite"
