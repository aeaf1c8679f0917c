"""The report as Markdown text."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from slrprop.errors import printable
from slrprop.report.words import LAYER_COLUMNS, quality, short_size


def text(facts: dict[str, Any]) -> str:
    """All facts, the verdict first."""
    parts = [f"# slrprop report{': ' + _plain(facts['model']) if facts['model'] else ''}", f"**{facts['verdict']}**"]
    parts.append(_table(["", "value"], facts["summary"]))
    parts.append(
        _table(
            ["budget", "asked", "reached", "holds"],
            [(what, asked, reached, "yes" if holds else "no") for what, asked, reached, holds in facts["goals"]],
        )
    )
    parts += ["## Trade-off", _points(facts), "## Layers", _layers(facts)]
    if facts["left_dense"]:
        parts.append(_table(["layer without candidates", "why"], facts["left_dense"].items()))
    parts += [_layer(layer) for layer in facts["layers"]]
    parts += ["## To repeat it", _table(["", "value"], facts["repeat"])]
    return "\n\n".join(parts) + "\n"


def _plain(value: Any) -> str:
    """Text that Markdown takes as it is."""
    return re.sub(r"([\\`*<>\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", printable(str(value)))


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _points(facts: dict[str, Any]) -> str:
    rows = []
    for index, point in enumerate(facts["points"]):
        forms = [
            f"{layer['name']}: {layer['candidates'][place]['form']}"
            for layer, place in zip(facts["layers"], point["plan"], strict=True)
            if place
        ]
        found = point["quality"]
        rows.append(
            (
                f"{index} (chosen)" if index == facts["chosen"] else index,
                f"{'' if point['exact'] else 'about '}{point['bytes']:,}",
                "" if found is None else quality(found, facts["metric"]),
                _number(point["damage"]),
                _number(point["divergence"]),
                "" if point["latency"] is None else f"{1e3 * point['latency']:.3g} ms",
                "; ".join(forms) or "original",
            )
        )
    header = [
        "step",
        "bytes",
        f"{facts['metric']} (search part)",
        "predicted damage",
        "divergence",
        "latency",
        "plan",
    ]
    command = facts["points"][facts["chosen"]]["command"] if facts["points"] else ""
    return (
        _table(header, rows)
        + f"\n\nThe command of the chosen point; put the bytes of another measured point to get that one, or a little more than those of a predicted one:\n\n```\n{command}\n```"
    )


def _layers(facts: dict[str, Any]) -> str:
    rows = [
        (
            layer["name"],
            "" if layer["shape"] is None else "{} x {}".format(*layer["shape"]),
            layer["form"],
            f"{layer['before']:,}",
            f"{layer['after']:,}",
            f"{layer['compression_rate']:.4f}",
            _number(layer["error"]),
            _number(layer["sensitivity"]),
        )
        for layer in facts["layers"]
    ]
    return _table(LAYER_COLUMNS, rows)


def _layer(layer: dict[str, Any]) -> str:
    parts = [
        f"### {_plain(layer['name'])}",
        f"{_plain(layer['form'])}, {short_size(layer['before'])} to {short_size(layer['after'])}.",
    ]
    if layer["settings"]:
        parts.append(f"Settings: {_plain(layer['settings'])}.")
    if layer["kept"]:
        parts += [
            f"{side.capitalize()} at full rank: {bits.count('1')} of {len(bits)} ({_ranges(bits)}); the others keep rank {layer['reduced_rank']}."
            for side, bits in zip(("rows (inputs)", "columns (outputs)"), layer["kept"], strict=True)
        ]
    for side, scores in zip(("rows (inputs)", "columns (outputs)"), layer["relevance"], strict=False):
        ordered = sorted(scores)
        parts.append(
            f"Relevance of {side}, {layer['criterion']}: {_number(ordered[0])} to {_number(ordered[-1])}, median {_number(ordered[len(ordered) // 2])}."
        )
    if values := layer["singular_values"]:
        marks = [rank for rank in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if rank < len(values)] + [len(values)]
        marks = sorted({*marks, layer["rank"]} - {0})
        rows = [(f"{rank} (chosen)" if rank == layer["rank"] else rank, _number(values[rank - 1])) for rank in marks]
        parts.append(_table(["rank", "singular value"], rows))
    candidates = [
        (
            f"{x['form']} (chosen)" if place == layer["place"] else x["form"],
            f"{x['bytes']:,}",
            _number(x["error"]),
            "yes" if x["hull"] else "",
        )
        for place, x in enumerate(layer["candidates"])
    ]
    parts.append(_table(["candidate", "bytes", "relative error", "on the hull"], candidates))
    return "\n\n".join(parts)


def _ranges(bits: str) -> str:
    """Numbers of the neurons: ``0-3, 7``."""
    found = []
    for _, run in groupby((at for at, bit in enumerate(bits) if bit == "1"), key=_since(bits)):
        members = list(run)
        found.append(f"{members[0]}" if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(found) or "none"


def _since(bits: str) -> Any:
    """A key that is the same for neighbours: how many zeros come before."""
    zeros = [0]
    for bit in bits:
        zeros.append(zeros[-1] + (bit == "0"))
    return lambda at: zeros[at]
