"""The facts of a report: one JSON-like dictionary that both the page and the text are made from."""

import json
import math
import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from slrprop import __version__
from slrprop.checks import share
from slrprop.errors import without_passwords
from slrprop.metrics import MEANING, PERCENT
from slrprop.plan import LayerPlan, method_of
from slrprop.report import words
from slrprop.search import Candidate, Compression, hull

MORE = 256  # bytes by which a rewritten layer may take more in the file than is predicted
Rows = list[tuple[str, str]]  # what, and its value in words


def facts_of(
    compression: Compression, command: str | Sequence[str], parity: float | Mapping[str, float] | None
) -> dict[str, Any]:
    """Everything a report says: texts under ``verdict``, ``summary``, ``goals``, ``repeat``; numbers under ``points`` and ``layers``."""
    command = without_passwords(command) if isinstance(command, str) else [without_passwords(part) for part in command]
    plans = {layer.name: layer for layer in compression.plan.layers}
    layers = [_layer(compression, name, plans.get(name)) for name in compression.curves]
    plain = ("met", "metric", "quality", "drop", "change", "interval", "bytes", "latency", "chosen", "left_dense")
    return {name: _plain(getattr(compression, name)) for name in plain} | {
        "model": str(compression.settings.get("model", "")),
        "verdict": _verdict(compression),
        "meaning": MEANING.get(compression.metric, compression.metric),
        "percent": compression.metric in PERCENT,
        "summary": _summary(compression),
        "goals": _goals(compression),
        "command": command if isinstance(command, str) else shlex.join(command),
        "points": _points(compression, command, layers),
        "comparable": len(compression.curves) > 1,  # one layer's damage is its own error, no divergence
        "layers": layers,
        "repeat": _repeat(compression, command, parity),
    }


def _plain(value: Any) -> Any:
    """A value for JSON: pairs as lists, what is not finite as None."""
    if isinstance(value, (tuple, list)):
        return list(map(_plain, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _verdict(c: Compression) -> str:
    lost = c.change if c.drop >= 0 else "gain" if c.change == "drop" else "fall"
    return (
        f"{'Budget met' if c.met else 'Budget not met'}: {_budget(c)}. "
        f"{'The' if c.met else 'In the nearest network that was found, the'} file goes from {words.short_size(c.bytes[0])} to "
        f"{words.short_size(c.bytes[1])}, {c.metric.replace('_', ' ')} from {words.quality(c.metric, c.quality[0])} to "
        f"{words.quality(c.metric, c.quality[1])} (a {lost} of {words.drop(c.metric, abs(c.drop))}, "
        f"95 % interval of the {c.change} {words.drop(c.metric, *c.interval)})."
    )


def _budget(c: Compression) -> str:
    asked = [(f"a {c.change} of {most}" if what.startswith(c.change) else most) for what, most, *_ in _goals(c)]
    return ", ".join(asked)


def _summary(c: Compression) -> Rows:
    before, after = c.bytes
    rows = [
        ("file before", words.size(before)),
        ("file after", words.size(after)),
        ("share of the original file", f"{100 * after / before:.2f} %"),
        (f"{c.metric} before", words.quality(c.metric, c.quality[0])),
        (f"{c.metric} after", words.quality(c.metric, c.quality[1])),
        (c.change, words.drop(c.metric, c.drop)),
        (f"95 % interval of the {c.change}", words.drop(c.metric, *c.interval)),
        *((name, f"{before:.2f} -> {after:.2f} %") for name, (before, after) in c.beside.items()),
    ]
    if not math.isnan(c.latency[0]):
        slow, fast = map(words.milliseconds, c.latency)
        rows += [("latency before", slow), ("latency after", fast)]
    rows += [("remark", remark) for remark in c.remarks()]
    return [*rows, ("budget", _budget(c)), ("evaluations of a whole network", str(c.evaluations))]


def _goals(c: Compression) -> list[tuple[str, str, str, bool]]:
    """For every limit of the budget: its name, what was asked, what was reached, and whether that holds."""
    confident = bool(c.settings.get("confident"))
    lost = f"{c.change}, upper end of its interval" if confident else c.change
    rows: list[tuple[str, Any, Any, Callable[[Any], str]]] = [
        (lost, c.budget.max_drop, c.interval[1] if confident else c.drop, lambda value: words.drop(c.metric, value)),
        ("file", c.budget.max_bytes, c.bytes[1], words.size),
        ("latency", c.budget.max_latency, c.latency[1], words.milliseconds),
    ]
    return [
        (what, f"at most {told(most)}", told(value), value <= most)
        for what, most, value, told in rows
        if most is not None
    ]


def _points(c: Compression, command: str | Sequence[str], layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every plan on the path; ``plan`` has, for each layer, the place of its form among the layer's candidates.

    The bytes of a point that was not measured are those predicted; its command allows for some more.
    """
    places = {layer["name"]: {x["form"]: i for i, x in enumerate(layer["candidates"])} for layer in layers}
    found = []
    for index, point in enumerate(c.points):
        plans = {layer.name: layer for layer in point.plan.layers}
        measured, written = point.measured, {0: 0, c.chosen: 1}.get(index)
        exact = measured.bytes if measured else None
        reached = c.bytes[written] if written is not None else exact or point.predicted_bytes
        room = 0
        if written is None and exact is None:
            room = min((c.points[index - 1].predicted_bytes - point.predicted_bytes) // 2, MORE * len(plans))
        found.append(
            {
                "bytes": reached,
                "exact": written is not None or exact is not None,
                "damage": _plain(point.predicted_damage),
                "quality": _plain(measured.quality if measured else None),
                "divergence": _plain(measured.divergence if measured else None),
                "latency": _plain(point.latency if written is None else c.latency[written]),
                "plan": [_place(places[name], plans.get(name)) for name in c.curves],
                "command": words.command_for(command, reached + room),
            }
        )
    return found


def _place(places: Mapping[str, int], layer: LayerPlan | None) -> int:
    """The layer's place among the candidates; a layer that was only refitted is as large as the dense one."""
    return places.get(words.form(layer), 0)


def _candidates(curve: Sequence[Candidate]) -> list[dict[str, Any]]:
    """A layer's candidates, the dense one first; ``hull`` says which the path goes through."""
    best = {id(candidate) for candidate in hull(list(curve))}
    ordered = sorted(curve, key=lambda candidate: candidate.layer is not None)
    return [
        {
            "method": "dense" if x.layer is None else method_of(x.layer),
            "rank": 0 if x.layer is None else x.layer.settings.get("rank", 0),
            "bytes": x.bytes,
            "error": float(f"{x.error:.5g}"),
            "hull": id(x) in best,
            "form": words.form(x.layer),
        }
        for x in ordered
    ]


def _layer(c: Compression, name: str, layer: LayerPlan | None) -> dict[str, Any]:
    candidates = _candidates(c.curves[name])
    place = _place({x["form"]: i for i, x in enumerate(candidates)}, layer)
    seen, masks = c.observed.get(name), words.kept(layer)
    shape = layer.shape if layer is not None else seen.shape if seen is not None else None
    reduced = 0 if masks is None or layer is None else share(layer.settings["rank"], layer.settings["reduction_rate"])
    return {key: candidates[place][key] for key in ("method", "form", "rank", "error")} | {
        "name": name,
        "shape": _plain(shape),
        "reduced_rank": reduced,
        "settings": "" if layer is None else words.settings(layer),
        "before": candidates[0]["bytes"],
        "after": candidates[place]["bytes"],
        "compression_rate": 1.0 if layer is None else layer.numbers / (layer.shape[0] * layer.shape[1]),
        "place": place,
        "candidates": candidates,
        "kept": None if masks is None else ["".join("1" if bit else "0" for bit in mask) for mask in masks],
        "sensitivity": None if seen is None else _plain(seen.sensitivity),
        "energy": None if seen is None else seen.energy,
        "singular_values": [] if seen is None else _short(seen.singular_values),
        "criterion": "" if seen is None else words.criterion(seen.criterion),
        "relevance": [] if seen is None else [_short(seen.rows), _short(seen.columns)],
    }


def _repeat(c: Compression, command: str | Sequence[str], parity: float | Mapping[str, float] | None) -> Rows:
    given = dict(c.settings)
    outputs = parity.items() if isinstance(parity, Mapping) else [] if parity is None else [("all outputs", parity)]
    methods = given.pop("methods", [])
    rows = [("command", command if isinstance(command, str) else shlex.join(command))] if command else []
    rows += [(f"setting: {key}", str(value)) for key, value in given.items() if value is not None]
    rows += [
        (f"method tried: {name}", ", ".join(f"{k}={v}" for k, v in chosen.items()) or "default settings")
        for name, chosen in methods
    ]
    rows += [
        ("seed", str(c.seed)),
        ("samples that chose", f"{c.samples[0]:,}"),
        ("samples of the check, and looks at them", f"{c.samples[1]:,}, {c.looks}"),
        ("data fingerprint (SHA-256 of the samples that chose and the original's outputs)", c.data_fingerprint),
        ("run time", f"{c.seconds:.1f} s"),
    ]
    if c.plan.layers:
        rows.append(("plan (SHA-256)", str(json.loads(c.plan.to_json())["sha256"])))
    rows += [(f"parity of {name}", f"largest difference {value:.3g}") for name, value in outputs]
    packages = {"slrprop": __version__} | {name: version(name) for name in ("torch", "onnxruntime", "onnx", "numpy")}
    rows += [(f"version: {name}", number) for name, number in packages.items()]
    rows += [
        ("version: python", platform.python_version()),
        ("platform", f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"),
        ("threads", f"{torch.get_num_threads()} for the search (torch), 1 for latencies (ONNX Runtime)"),
    ]
    return rows
