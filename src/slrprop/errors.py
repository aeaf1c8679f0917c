"""The one exception class of slrprop, and text that a terminal takes as it is."""


class SlrpropError(ValueError):
    """A request that cannot be met: one sentence with what was asked, what was seen and what to do."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))  # it names layers and files, which may be called anything


def first_line(error: BaseException) -> str:
    """The first line of what another library raised, for one sentence of our own."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def printable(text: str) -> str:
    """The text on one line, its control, bidirectional and other invisible characters escaped as Python writes them."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
