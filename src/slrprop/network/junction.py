"""Channels between layers, which go or move together."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Junction:
    """Neurons or channels that layers make and others read, each of which goes its own way between.

    ``makers`` are the layers whose outputs they are. ``carriers`` are batch norms, with arrays of one number per channel, by the
    modules' names; of a file also reshapes that say how many there are, all by what the nodes make. ``readers`` says of each layer that reads them how many rows of it belong to one
    channel: 1, kh * kw of a convolution, h * w behind a flatten; they stand in a block.
    """

    makers: tuple[str, ...]
    carriers: tuple[str, ...]
    readers: dict[str, int]

    @property
    def layers(self) -> tuple[str, ...]:
        """Makers and readers."""
        return (*self.makers, *self.readers)

    def __str__(self) -> str:
        return " feeds ".join(", ".join(f"'{name}'" for name in side) for side in (self.makers, self.readers))
