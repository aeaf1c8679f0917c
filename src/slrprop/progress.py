"""Progress of long work: a bar on a terminal, elsewhere a line every ten seconds."""

import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


class Progress(tqdm):  # type: ignore[misc]
    """tqdm's bar; where standard error is no terminal, tqdm's monitor asks for a line instead, however long a step takes.

    ``Progress.quiet`` leaves out both in this process.
    """

    quiet = False

    def __init__(self, *given: Any, disable: bool = False, **settings: Any) -> None:
        self.lines, self.told, every = not sys.stderr.isatty(), time.monotonic(), self.monitor_interval
        settings |= {"miniters": sys.maxsize, "leave": False} if self.lines else {}
        super().__init__(*given, disable=disable or self.quiet, mininterval=1, maxinterval=every, **settings)

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show how far the work is."""
        if not self.lines:
            return super().display(msg, pos)
        self.miniters = sys.maxsize  # which the monitor has changed
        if msg is None and time.monotonic() - self.told > 0.9 * self.maxinterval:
            self.told = time.monotonic()
            print(self.line(), file=self.fp)
        return False

    def line(self) -> str:
        """How far the work is, in words."""
        done = self.n - self.initial
        seconds = (self._time() - self.start_t) / max(1, done) * ((self.total or self.n) - self.n)
        left = f"about {seconds:.0f} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"
        share = f"{100 * self.n / self.total:.0f} %, {self.n} of {self.total}" if self.total else f"{self.n} so far"
        return f"{self.desc}: {', '.join([share, *([left] if done and self.total else [])])}"
