"""The one exception class of slrprop."""


class SlrpropError(ValueError):
    """A request that cannot be met: one sentence with what was asked, what was seen and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of what another library raised, for one sentence of our own."""
    return str(error).strip().split("\n")[0] or type(error).__name__
