"""The plan: per layer a method and its settings; frozen, saved as versioned JSON."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.factors import Factors
from slrprop.files import replacing

FORMAT = "slrprop-plan"
VERSION = 1
MAX_PLAN_BYTES = 256 << 20


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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

    ``shape`` is (m, n), inputs x outputs; ``fingerprint`` the SHA-256 of the original weight; ``factors`` are what
    the method built, kept in memory only.
    """

    name: str
    shape: tuple[int, int]
    fingerprint: str
    method: str
    settings: dict[str, Any]
    numbers: int
    kept_rows: str = ""
    kept_columns: str = ""
    factors: Factors | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Plan:
    """What to do with a model.

    ``left_dense`` says for each layer that was asked for and stays as it is, why. ``feeds`` names pairs of layers
    whose neurons may be reordered together, because only element-wise functions stand between them. ``sha256`` is the
    checksum that a loaded file carried; take it out of the file to use a plan edited by hand.
    """

    layers: tuple[LayerPlan, ...]
    left_dense: dict[str, str] = field(default_factory=dict)
    feeds: dict[str, str] = field(default_factory=dict)
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
            f"{layer.name}: {layer.shape[0]} x {layer.shape[1]}, {layer.method}, rank {layer.settings['rank']}, {layer.numbers:,} numbers, "
            f"compression_rate {layer.numbers / (layer.shape[0] * layer.shape[1]):.4f}"
            for layer in self.layers
        ]
        return "\n".join(lines + [f"{name}: left dense ({reason})" for name, reason in self.left_dense.items()])

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
                    {key: value for key, value in vars(layer).items() if key != "factors"} for layer in self.layers
                ],
                "left_dense": self.left_dense,
                "feeds": self.feeds,
            }
        )
        return content

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        text = self.to_json()
        with replacing(path) as part:
            part.write_text(text)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan.

        Raises:
            SlrpropError: no such file, not JSON, not a plan, or of another version.
        """
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
            if head.get("version") != VERSION:
                raise SlrpropError(
                    f"'{path}' has plan version {head.get('version')!r}; this slrprop reads version {VERSION}"
                )
            return msgspec.convert(head, cls)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise SlrpropError(f"'{path}' is not a readable plan: {error}") from error
