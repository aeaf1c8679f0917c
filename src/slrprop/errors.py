"""The one exception class of slrprop, and text that a terminal takes as it is."""

import re


class SlrpropError(ValueError):
    """A request that cannot be met: one sentence with what was asked, what was seen and what to do; it tells no password."""

    def __init__(self, sentence: str) -> None:
        super().__init__(
            without_passwords(printable(sentence))
        )  # it names layers, files and URLs, which may hold anything


def without_passwords(text: str) -> str:
    """The text with ``***`` for the passwords of URLs, and for values that are called so."""
    text = re.sub(r"://(?!user:password@host/name)([^\s:@/]*):\S*@", r"://\1:***@", text)
    return re.sub(r"(?i)((?:password|passwd|pwd|secret|token)=)('[^']*'|[^&\s']+)", r"\1***", text)


def first_line(error: BaseException) -> str:
    """The first line of what another library raised, for one sentence of our own."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def printable(text: str) -> str:
    """The text on one line, its control, bidirectional and other invisible characters escaped as Python writes them."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
