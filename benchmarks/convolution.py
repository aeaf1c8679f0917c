"""Convolutions in ONNX Runtime: every form's latency beside the dense one's and the runtime's own int8.

    python -m benchmarks.convolution [--channels 64 128 256 512] [--sides 4 8 16 32] [--batches 1 32] [--turns 15]

One 3 x 3 convolution with as many channels in as out, on maps of side x side, one thread, medians of that thread's time over interleaved
runs; values do not matter for speed. *half*, *quarter*: of the dense layer's numbers (Tucker: channels so chosen), in whole blocks of 16 channels; *half the
channels*: half as many on both sides, a quarter of the numbers. *int8*: what onnxruntime.quantization writes (QDQ, uint8 inputs, int8 weights by
channel), alone and of the spatial form. Times faster than dense; above 1 is faster.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

from benchmarks.quantisation import header
from slrprop.export import export_onnx
from slrprop.forms import Fit, Form, LowRank, Spatial, Tucker
from slrprop.latency import latencies
from slrprop.network.torch.find import operator_of
from slrprop.network.torch.modules import layer_from

BLOCK = 16


def blocks(count: float) -> int:
    """The nearest whole number of vector blocks, one at least."""
    return max(1, round(count / BLOCK)) * BLOCK


def numbers(rows: int, columns: int) -> torch.Tensor:
    """A matrix that keeps the size of what it multiplies."""
    return torch.randn(rows, columns) / rows**0.5


def forms(channels: int) -> dict[str, Form]:
    """Forms of half and a quarter of the numbers."""
    m, n, found = 9 * channels, channels, {}
    for name, share in (("half", 0.5), ("quarter", 0.25)):
        rank = blocks(share * m * n / (m + n))
        found[f"low rank, {name}"] = LowRank(numbers(m, rank), numbers(rank, n))
        rank = blocks(share * m * n / (6 * channels))
        found[f"spatial, {name}"] = Spatial((3, 3), numbers(3 * channels, rank), numbers(3 * rank, n))
        inner = blocks((-2 + (4 + 36 * 9 * share) ** 0.5) / 18 * channels)  # 2 C s + 9 s^2 = share * 9 C^2
        found[f"Tucker, {name}"] = Tucker((3, 3), numbers(channels, inner), numbers(9 * inner, inner), numbers(inner, n))  # fmt: skip
    return found


class Once(CalibrationDataReader):
    """One batch of inputs."""

    def __init__(self, name: str, x: np.ndarray) -> None:
        self.left = [{name: x}]

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The batch, then nothing."""
        return self.left.pop() if self.left else None


def files(channels: int, x: torch.Tensor, folder: Path) -> dict[str, Path]:
    """A file for every form, int8 among them."""
    dense = nn.Conv2d(channels, channels, 3, padding=1).eval()
    operator, bias = operator_of(dense), dense.bias.detach()
    modules: dict[str, nn.Module] = {"dense": dense}
    modules |= {name: layer_from(Fit(form).over(bias), operator).eval() for name, form in forms(channels).items()}
    modules["half the channels"] = nn.Conv2d(channels // 2, channels // 2, 3, padding=1).eval()
    found = {}
    for name, module in modules.items():
        found[name] = folder / f"{name}.onnx"
        few = x[:, : channels // 2] if name == "half the channels" else x
        export_onnx(module, found[name], few[:2] if len(x) > 1 else few, dynamic_batch=len(x) > 1)
    for name in ("dense", "spatial, half", "spatial, quarter"):
        target, reader = folder / f"int8 {name}.onnx", Once(onnx.load(found[name]).graph.input[0].name, x.numpy())
        quantize_static(
            found[name], target, reader, quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, per_channel=True,
        )  # fmt: skip
        found[f"int8, {name}"] = target
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--sides", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--turns", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    shown: list[str] = []
    for channels in args.channels:
        for side in args.sides:
            for batch in args.batches:
                with tempfile.TemporaryDirectory() as folder:
                    x = torch.randn(batch, channels, side, side)
                    made = files(channels, x, Path(folder))
                    narrow = made.pop("half the channels")
                    times = latencies(made, [x.numpy()], args.turns)
                    pair = latencies({"dense": made["dense"]}, [x.numpy()], args.turns)
                    half = latencies({"half": narrow}, [x[:, : channels // 2].numpy()], args.turns)
                times["half the channels"] = times["dense"] * half["half"] / pair["dense"]
                if not shown:
                    shown = [name for name in times if name != "dense"]
                    header("channels", "side", "batch", *shown)
                faster = " | ".join(f"{times['dense'] / times[name]:.2f}" for name in shown)
                print(f"| {channels} | {side} | {batch} | {faster} |", flush=True)


if __name__ == "__main__":
    main()
