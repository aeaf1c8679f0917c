"""The one exception class of slrprop."""


class SlrpropError(ValueError):
    """A request that cannot be met: one sentence with what was asked, what was seen and what to do."""
