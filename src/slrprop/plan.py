"""The plan: per layer a method and its settings; frozen, saved as versioned JSON."""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from slrprop.data import content
from slrprop.errors import SlrpropError, printable
from slrprop.files import Refusal, replacing, require_regular, together
from slrprop.forms import Bias, Fit, Form, restored
from slrprop.network.junction import Junction

FORMAT = "slrprop-plan"
VERSION = 2
MAX_PLAN_BYTES = 256 << 20
SIZES = ("rank", "density", "keep", "gain")  # settings that say how much is kept


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _text_of(form: dict[str, Any]) -> str:
    return json.dumps(form, sort_keys=True)


def arrays_digest(head: str, arrays: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and of arrays: their names, shapes, dtypes and values."""
    digest = hashlib.sha256(head.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {tuple(array.shape)} {array.dtype}".encode())
        digest.update(content(array))
    return digest.hexdigest()


def pack(kept: Tensor) -> str:
    """A bool mask as hexadecimal bits, first neuron first."""
    bits = "".join("1" if bit else "0" for bit in kept.tolist())
    return f"{int(bits, 2):0{-(-len(bits) // 4)}x}" if bits else ""


def unpack(text: str, count: int) -> Tensor:
    """The mask of ``count`` neurons that :func:`pack` wrote."""
    value = int(text, 16) if re.fullmatch("[0-9a-f]+", text) else -1
    if value < 0 or value >> count or len(text) != -(-count // 4):
        raise SlrpropError(f"the plan's neuron set '{text[:20]}' is not {count} hexadecimal bits; the file is damaged")
    return torch.tensor([bit == "1" for bit in f"{value:0{count}b}"])


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its method and settings, and the neurons that keep the full rank (hexadecimal bits).

    ``shape`` is (m, n), inputs x outputs; ``fingerprint`` the SHA-256 of the original weight; ``numbers`` and ``bytes`` are
    what the factors store; ``notes`` what else the method reports. ``fit`` is what the method gave: ``factors``, and ``bias``
    (n,) if that changes. Forms that were fitted to data can't be rebuilt from the weight: ``form`` is their
    description, ``fitted`` the SHA-256 of it and of their arrays, which are saved beside the plan.
    """

    name: str
    shape: tuple[int, int]
    fingerprint: str
    method: str
    settings: dict[str, Any]
    numbers: int
    bytes: int = 0
    kept_rows: str = ""
    kept_columns: str = ""
    notes: dict[str, float] = field(default_factory=dict)
    form: dict[str, Any] = field(default_factory=dict)
    fitted: str = ""
    fit: Fit | None = field(default=None, compare=False, repr=False)

    @property
    def factors(self) -> Form | None:
        """The form in the place of the weight; None where it is to be built from the weight."""
        return None if self.fit is None else self.fit.form

    @property
    def bias(self) -> Tensor | None:
        """The new bias (n,); None where the layer's own stays."""
        return None if self.fit is None or self.fit.bias is None else self.fit.bias.value

    def sealed(self) -> "LayerPlan":
        """The same layer with the description and checksum of its fitted factors.

        Raises:
            SlrpropError: the plan was read without its factors.
        """
        assert self.fit is not None
        form = self.fit.form.description()
        return replace(self, form=form, fitted=arrays_digest(_text_of(form), self.fit.arrays()))


def wording(layer: LayerPlan) -> str:
    """A layer's method and how much it keeps, like ``nested (three-wide), 4 bits, rank 12``."""
    told = [f"{key} {layer.settings[key]:g}" for key in SIZES if layer.settings.get(key) is not None]
    return ", ".join([method_of(layer), *told])


def method_of(layer: LayerPlan) -> str:
    """A layer's method with what tells its variants apart."""
    given = layer.settings
    variants = [str(given[key]) for key in ("shape", "variant") if given.get(key)]
    bits = [] if given.get("bits", 32) == 32 else [f"{given['bits']} bits"]
    return ", ".join([layer.method + (f" ({', '.join(variants)})" if variants else ""), *bits])


@dataclass(frozen=True)
class Plan:
    """What to do with a model.

    ``left_dense`` says for each layer that was asked for and stays as it is, why. ``junctions`` are those around the layers, whose
    channels may go or be put in another order. ``folded`` names batch norms
    that are put into the layers before them first, by these layers. ``sha256`` is the
    checksum that a loaded file carried; take it out of the file to use a plan edited by hand.
    """

    layers: tuple[LayerPlan, ...]
    left_dense: dict[str, str] = field(default_factory=dict)
    junctions: tuple[Junction, ...] = ()
    folded: dict[str, str] = field(default_factory=dict)
    format: str = FORMAT
    version: int = VERSION
    sha256: str = field(default="", compare=False)

    @property
    def numbers(self) -> int:
        """Stored numbers of the planned layers' weights."""
        return sum(layer.numbers for layer in self.layers)

    @property
    def compression_rate(self) -> float:
        """Stored numbers / original numbers of the planned layers' weights; smaller is better (1 if none is planned)."""
        before = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return self.numbers / before if before else 1.0

    def __str__(self) -> str:
        lines = [
            f"{layer.name}: {layer.shape[0]} x {layer.shape[1]}, {wording(layer)}, {layer.numbers:,} numbers"
            + (f" in {layer.bytes:,} bytes" if layer.bytes else "")
            + f", compression_rate {layer.numbers / (layer.shape[0] * layer.shape[1]):.4f}"
            + "".join(f", {key} {value:.3g}" for key, value in layer.notes.items())
            for layer in self.layers
        ]
        lines += [f"{name}: left dense ({reason})" for name, reason in self.left_dense.items()]
        return "\n".join(map(printable, lines))

    def to_json(self) -> str:
        """The plan as JSON: the same plan gives the same text."""
        for layer in self.layers:
            if callable(layer.settings.get("solver")):
                raise SlrpropError(
                    f"the solver of layer '{layer.name}' is a function, which JSON can't hold; plan with a named solver"
                )
        content = self._content()
        return json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n"

    def is_damaged(self) -> bool:
        """Whether a loaded plan differs from the one that was saved."""
        return bool(self.sha256) and self.sha256 != _digest(self._content())

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = msgspec.to_builtins(
            {
                "format": self.format,
                "version": self.version,
                "layers": [
                    {key: value for key, value in vars(layer).items() if key != "fit"}
                    | {"notes": {key: note for key, note in layer.notes.items() if math.isfinite(note)}}
                    for layer in self.layers
                ],
                "left_dense": self.left_dense,
                "junctions": self.junctions,
                **({"folded": self.folded} if self.folded else {}),
            }
        )
        return content

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; factors that were fitted to data beside it, as safetensors of the same name.

        Raises:
            SlrpropError: a file can't be written, the plan was read without its factors, or something else than a plan
                and its own factors is there; existing files stay as they were.
        """
        text = self.to_json()
        target, refusal = places(path)
        fitted = {f"{layer.name}/{name}": array.detach().cpu().contiguous() for layer in self.layers if layer.fitted and layer.fit for name, array in layer.fit.arrays().items()}  # fmt: skip
        with together():  # both are written before one of them takes its place
            if fitted:
                with replacing(target, refusal) as part:
                    part.write_bytes(safetensors.torch.save(fitted, {"format": FORMAT}))
            with replacing(path, no_plan) as part:
                part.write_text(text)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan.

        Raises:
            SlrpropError: no such file, not JSON, not a plan, or of another version.
        """
        require_regular(path)
        try:
            if Path(path).stat().st_size > MAX_PLAN_BYTES:
                raise SlrpropError(f"'{path}' is larger than {MAX_PLAN_BYTES:,} bytes; it is no plan")
            raw = Path(path).read_bytes()
        except OSError as error:
            raise SlrpropError(f"the plan '{path}' can't be read: {error.strerror}") from error
        try:
            head = msgspec.json.decode(raw)
            if not isinstance(head, dict) or head.get("format") != FORMAT:
                raise SlrpropError(f"'{path}' is not a slrprop plan; write one with Plan.save")
            if head.get("version") not in (1, VERSION):
                raise SlrpropError(
                    f"'{path}' has plan version {head.get('version')!r}; this slrprop reads versions 1 and {VERSION}"
                )
            plan = _of_version_1(head) if head["version"] == 1 else msgspec.convert(head, cls)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise SlrpropError(f"'{path}' is not a readable plan: {error}") from error
        return replace(plan, layers=tuple(_with_factors(layer, beside(path)) for layer in plan.layers))


def _of_version_1(head: dict[str, Any]) -> Plan:
    """A plan of before there were junctions: ``feeds`` named pairs of dense layers with functions of one number between."""
    intact = head.get("sha256") == _digest({key: value for key, value in head.items() if key != "sha256"})
    feeds = msgspec.convert(head.get("feeds", {}), dict[str, str])
    pairs = tuple(Junction((first,), (), {second: 1}) for first, second in feeds.items())
    plan = replace(msgspec.convert(head | {"version": VERSION}, Plan), junctions=pairs)
    return replace(plan, sha256=_digest(plan._content())) if intact else plan


def beside(path: str | Path) -> Path:
    """Where the fitted factors of the plan at ``path`` are."""
    return Path(path).parent / f"{Path(path).stem}.safetensors"


def places(path: str | Path) -> tuple[Path, Refusal]:
    """Where the fitted factors of the plan at ``path`` would be saved, and what may not be there.

    Raises:
        SlrpropError: that is the plan's own place, or the path is a link.
    """
    path, target = Path(path), beside(path)
    if path == target:
        raise SlrpropError(f"'{path}' is where the plan's factors would be; give the plan another ending, like .json")
    if os.path.islink(path):  # noqa: PTH114
        raise SlrpropError(f"'{path}' is a link, and the plan's factors would lie beside one of its two names; name '{path.resolve()}'")  # fmt: skip

    def refusal(target: Path) -> str:
        same = (other for other in target.parent.iterdir() if other.stem == path.stem and other.is_file())
        owners = [other.name for other in same if not no_plan(other)]
        if owners != [path.name]:
            return f"is not beside the plan '{path.name}' alone, but beside {', '.join(owners) or 'no plan'}"
        return header_refusal("is not a plan's factors", FORMAT)(target)

    return target, refusal


class _Head(msgspec.Struct):
    format: str


def no_plan(path: Path) -> str:
    """Why a file is no plan that another may replace."""
    with contextlib.suppress(msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        small = path.stat().st_size <= MAX_PLAN_BYTES
        if small and msgspec.json.decode(path.read_bytes(), type=_Head).format == FORMAT:
            return ""
    return "is no plan of slrprop"


def header_refusal(told: str, kind: str) -> Refusal:
    """Lets safetensors files go whose header says that they are of our format ``kind``; others are ``told``."""

    def refusal(path: Path) -> str:
        try:
            with safetensors.safe_open(path, "pt") as file:
                return "" if (file.metadata() or {}).get("format") == kind else told
        except safetensors.SafetensorError:
            return told

    return refusal


def _with_factors(layer: LayerPlan, path: Path) -> LayerPlan:
    """A loaded layer with its fitted factors, if it has such."""
    if not layer.fitted:
        return layer
    prefix = f"{layer.name}/"
    require_regular(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            arrays = {
                name.removeprefix(prefix): file.get_tensor(name)
                for name in sorted(file.keys())
                if name.rpartition("/")[0] == layer.name
            }
    except (OSError, safetensors.SafetensorError) as error:
        raise SlrpropError(
            f"the factors of layer '{layer.name}' can't be read from '{path}', which belongs beside the plan: {error}"
        ) from error
    if arrays_digest(_text_of(layer.form), arrays) != layer.fitted:
        raise SlrpropError(f"the factors of layer '{layer.name}' in '{path}' are not those of this plan; the file is damaged or another's")  # fmt: skip
    bias, form = Bias.restored(arrays, layer.shape[1]), restored(layer.form, arrays)
    if form.shape != layer.shape:
        raise SlrpropError(f"the factors of layer '{layer.name}' in '{path}' are of another shape; the file is damaged")
    return replace(layer, fit=Fit(form, bias))
