"""The report as one page that needs nothing else: styles, script, facts and the plotting library inside."""

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from slrprop.errors import SlrpropError
from slrprop.report.words import LAYER_COLUMNS, milliseconds, quality, short_size, times

# the browser itself then refuses everything that is not in the file
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
OPEN_LAYERS = 3  # up to so many, every layer's section starts open; else the one that saves most


def page(facts: dict[str, Any]) -> str:
    """The whole file.

    Raises:
        SlrpropError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise SlrpropError(
            "an .html report needs the package 'plotly'; install it with: pip install 'slrprop[report]', or write the report as .md"
        ) from error
    own = files("slrprop.report")
    style, script = (own.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    data = json.dumps(facts, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    title = f"slrprop report{': ' + facts['model'] if facts['model'] else ''}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
{_head(facts)}
{_trade_off(facts)}
{_layers(facts)}
<section id="repeat"><h2>To repeat it</h2>{_table([], facts["repeat"], "facts")}</section>
</main>
<script type="application/json" id="facts">{data}</script>
<script>{get_plotlyjs()}</script>
<script>{script}</script>
</body>
</html>
"""


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    """A table in a box of its own that scrolls; the first column is a heading."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{escape(str(first))}</th>{cells}</tr>')
    top = f"<thead><tr>{head}</tr></thead>" if header else ""
    return f'<div class="scroll" tabindex="0"><table class="{kind}">{top}<tbody>{"".join(lines)}</tbody></table></div>'


def _card(what: str, value: str, *notes: str) -> str:
    lines = "".join(f"<p>{escape(_tied(note))}</p>" for note in notes if note)
    return f'<div class="card"><h3>{escape(what)}</h3><p class="value">{escape(_tied(value))}</p>{lines}</div>'


def _tied(text: str) -> str:
    """Text whose percent signs and units stay with their numbers."""
    return re.sub(r"(?<=\d) (?=%|[kMG]?B\b|ms\b|points\b)", "\N{NO-BREAK SPACE}", text)


def _head(facts: dict[str, Any]) -> str:
    summary, metric, change = dict(facts["summary"]), facts["metric"], facts["change"]
    before, after = facts["bytes"]
    first, last = facts["quality"]
    cards = [
        _card("File", short_size(after), f"before: {short_size(before)}", times(before, after, "smaller")),
        _card(
            metric.replace("_", " ").capitalize(),
            quality(last, metric),
            f"before: {quality(first, metric)}",
            f"{change} {summary[change]}, 95 % interval {summary[f'95 % interval of the {change}']}",
        ),
    ]
    slow, fast = facts["latency"]
    if slow is not None:
        cards.append(
            _card(
                "Latency, one sample",
                milliseconds(fast),
                f"before: {milliseconds(slow)}",
                times(slow, fast, "faster"),
            )
        )
    cards.append(
        _card(
            "Evaluations", summary["evaluations of a whole network"], "runs of a whole network over a part of the data"
        )
    )
    goals = [(what, asked, reached, "yes" if holds else "no") for what, asked, reached, holds in facts["goals"]]
    state = "met" if facts["met"] else "missed"
    first_words, _, rest = _tied(facts["verdict"]).partition(": ")
    return f"""<header><p class="brand">slrprop report</p><h1>{escape(facts["model"] or "Compressed network")}</h1></header>
<section id="verdict" class="{state}"><p><strong>{escape(first_words)}</strong>: {escape(rest)}</p></section>
<div class="cards">{"".join(cards)}</div>
<section>{_table(["budget", "asked", "reached", "holds"], goals)}
<details><summary>Exact figures</summary>{_table([], facts["summary"], "facts")}</details>
<p class="note">{escape(metric.replace("_", " ").capitalize())}: {escape(facts["meaning"])}. Before and after are measured on the check part of the data, which
the search did not see; the interval is of the paired {change}, both networks on the same samples, and speaks of samples like those.</p></section>"""


def _trade_off(facts: dict[str, Any]) -> str:
    last = max(0, len(facts["points"]) - 1)
    timed = sum(point["latency"] is not None for point in facts["points"]) > 1
    switch = (
        """<div class="switch" role="group" aria-label="horizontal axis"><button type="button" data-axis="bytes" aria-pressed="true">Against file size</button>
<button type="button" data-axis="latency" aria-pressed="false">Against latency</button></div>"""
        if timed
        else ""
    )
    return f"""<section id="trade-off"><h2>What else was possible</h2>
<p class="note">Every point is one plan for the whole network. Quality here is that of the search part of the data, known for the plans that were measured;
the diamonds, with the 95 % interval of the {facts["change"]}, are from the check part. Below is the damage predicted from the layers alone, for every plan. Click a point or move the slider to see its plan.</p>
{switch}<div class="legend" id="curve-legend"></div><div id="curve" class="plot"></div>
<div id="picker"><label for="step">Plan <output id="step-name"></output></label>
<div class="ends"><span>original</span><span>smallest</span></div>
<input id="step" type="range" min="0" max="{last}" step="1" value="{facts["chosen"]}">
<dl id="picked"></dl>
<div class="command"><code id="command"></code><button type="button" id="copy">Copy</button></div>
<p class="note" id="about" hidden>This plan was not measured: its bytes are predicted, so its command can lead to a plan next to it, and of the very smallest plans to a budget just missed.</p>
<div class="scroll" tabindex="0"><table id="plan"></table></div></div></section>"""


def _layers(facts: dict[str, Any]) -> str:
    rows, parts = [], []
    saved = [layer["before"] - layer["after"] for layer in facts["layers"]]
    most = max(saved, default=0)
    for index, layer in enumerate(facts["layers"]):
        shape = "" if layer["shape"] is None else "{} x {}".format(*layer["shape"])
        sensitivity = "" if layer["sensitivity"] is None else f"{layer['sensitivity']:.3g}"
        sizes = (f"{layer['before']:,}", f"{layer['after']:,}")
        rows.append(
            (
                layer["name"],
                shape,
                layer["form"],
                *sizes,
                f"{layer['compression_rate']:.4f}",
                f"{layer['error']:.3g}",
                sensitivity,
            )
        )
        settings = f'<p class="note">Settings: {escape(layer["settings"])}.</p>' if layer["settings"] else ""
        start = " open" if len(saved) <= OPEN_LAYERS or 0 < most == saved[index] else ""
        parts.append(f"""<details class="layer" data-layer="{index}"{start}><summary><span class="name">{escape(layer["name"])}</span>
<span>{escape(shape)}</span><span>{escape(layer["form"])}</span><span>{short_size(layer["before"])} to {short_size(layer["after"])}</span></summary>{settings}
<div class="charts"><figure><figcaption>Singular values</figcaption><div class="plot" data-chart="values"></div></figure>
<figure><figcaption>Sensitivity: relative error of the output against bytes, all candidates</figcaption><div class="plot" data-chart="candidates"></div></figure>
<figure><figcaption>Relevance of the neurons, sorted ({escape(layer["criterion"] or "unknown")})</figcaption><div class="plot" data-chart="relevance"></div></figure>
<figure><figcaption>Rows and columns at full rank</figcaption><div class="kept" data-chart="kept"></div></figure></div></details>""")
    left = _table(["layer without candidates", "why"], facts["left_dense"].items()) if facts["left_dense"] else ""
    return f"""<section id="layers"><h2>Layers</h2>{_table(LAYER_COLUMNS, rows)}{left}
<p class="note">Shape is inputs x outputs: rows of the weight belong to inputs, columns to outputs. compression_rate is stored numbers / original numbers.
Sensitivity is the damage predicted per unit of relative error.</p>{"".join(parts)}</section>"""
