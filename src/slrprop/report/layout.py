"""The report laid out by templates: a page that needs nothing else, or Markdown text. Both read the same facts and tables."""

import re
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from slrprop.errors import SlrpropError, printable
from slrprop.report.words import milliseconds, quality, short_size, times

OPEN_LAYERS = 3  # up to so many, every layer's section starts open; else the one that saves most
SIDES = ("rows (inputs)", "columns (outputs)")
COLUMNS = ("layer", "shape", "form", "bytes before", "bytes after", "compression_rate", "relative error", "sensitivity")


def page(facts: dict[str, Any]) -> str:
    """The facts as one HTML file, with styles, script and the plotting library inside.

    Raises:
        SlrpropError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise SlrpropError(
            "an .html report needs the package 'plotly'; install it with: pip install 'slrprop[report]', or write the report as .md"
        ) from error
    style, script = (files("slrprop.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    saved = {layer["name"]: layer["before"] - layer["after"] for layer in facts["layers"]}
    opened = {name for name, less in saved.items() if len(saved) <= OPEN_LAYERS or 0 < max(saved.values()) == less}
    return _rendered("page.html", facts, style=style, script=script, plotting=get_plotlyjs(), opened=opened)


def text(facts: dict[str, Any]) -> str:
    """The facts as Markdown, the verdict first."""
    return _rendered("report.md", facts)


def _rendered(name: str, facts: dict[str, Any], **further: Any) -> str:
    escaped = select_autoescape(["html.jinja"], default=False)
    layout = Environment(
        loader=PackageLoader("slrprop.report", "."), autoescape=escaped, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    layout.filters |= {
        "plain": _plain, "tied": _tied, "number": _number, "ranges": _ranges, "spectrum": _spectrum,
    }  # fmt: skip
    layout.globals |= {
        "zip": zip, "sides": SIDES, "columns": COLUMNS, "rows": list(map(_layer, facts["layers"])), "facts": facts,
        "goals": [(*goal, "yes" if holds else "no") for *goal, holds in facts["goals"]],
        "short_size": short_size, "milliseconds": milliseconds, "quality": quality, "times": times,
    }  # fmt: skip
    layout.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return layout.get_template(f"{name}.jinja").render(**further)


def _plain(value: Any) -> str:
    """Text that Markdown takes as it is."""
    return re.sub(r"([\\`*<>\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", printable(str(value)))


def _tied(text: str) -> str:
    """Text whose percent signs and units stay with their numbers."""
    return re.sub(r"(?<=\d) (?=%|[kMG]?B\b|ms\b|points\b)", "\N{NO-BREAK SPACE}", text)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _ranges(bits: str) -> str:
    """Numbers of the neurons: ``0-3, 7``."""
    runs = [(run.start(), run.end() - 1) for run in re.finditer("1+", bits)]
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs) or "none"


def _layer(layer: dict[str, Any]) -> tuple[str, ...]:
    """A layer's row under ``COLUMNS``."""
    shape, sizes = " x ".join(map(str, layer["shape"] or ())), (f"{layer['before']:,}", f"{layer['after']:,}")
    rest = (f"{layer['compression_rate']:.4f}", _number(layer["error"]), _number(layer["sensitivity"]))
    return layer["name"], shape, layer["form"], *sizes, *rest


def _spectrum(layer: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of some ranks and their singular values."""
    values, rank = layer["singular_values"], layer["rank"]
    marks = {1 << power for power in range(11) if 1 << power < len(values)} | {len(values), rank} - {0}
    return [(f"{at} (chosen)" if at == rank else f"{at}", _number(values[at - 1])) for at in sorted(marks)]
