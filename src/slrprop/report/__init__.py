"""What a compression did and what else was possible, as one page or as text."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from slrprop.errors import SlrpropError
from slrprop.files import holding, replacing
from slrprop.report.facts import facts_of
from slrprop.report.layout import page, text
from slrprop.search import Compression

__all__ = ["write_report"]

no_report = holding("<title>slrprop report", "# slrprop report")  # why a file is no report that another may replace


def write_report(
    compression: Compression,
    path: str | Path,
    command: str | Sequence[str] = "",
    parity: float | Mapping[str, float] | None = None,
) -> None:
    """Write one self-contained page (``.html``), or the same facts as Markdown (``.md``).

    Args:
        compression: what :func:`slrprop.search.compress` returned, or the ``best`` of its ``BudgetError``.
        command: the command line that made it, as text or as arguments; the page derives the one of every other point.
        parity: how far the written file's outputs are from the factors' mathematics, in all or by output.

    Raises:
        SlrpropError: another suffix, plotly is not installed, the file can't be written, or another one than a report of ours is
            there, which stays as it is.
    """
    kind = Path(path).suffix.lower()
    if kind not in (".html", ".md"):
        raise SlrpropError(f"a report is an .html or an .md file, got '{path}'")
    facts = facts_of(compression, command, parity)
    content = page(facts) if kind == ".html" else text(facts)
    with replacing(path, no_report) as part:
        part.write_text(content, encoding="utf-8")
