"""Dense layers of today's sizes in ONNX Runtime: latency, bytes, and how near to the memory's limit they run.

    python -m benchmarks.wide_layers [--layers 768x3072 ...] [--parts 4 16] [--batches 1 8 32] [--turns 5]

1 thread, random weights (values do not matter for speed). Every layer dense, as truncated SVD and as SLR (rates 0.5, its neurons
in order, as ``slrprop.apply`` leaves them), of the rank at which the SVD has a quarter and a 16th of the dense numbers; dense and SVD
also in 8 and 4 bits: *Cast, Div* is what slrprop writes (float32 once loaded: the file is smaller), *MatMulNBits* what ONNX Runtime
makes of DequantizeLinear (whole numbers in memory, inputs rounded too).

*read*: the bytes of weights in memory that one run reads; *of the limit*: read / time / the rate at which one thread sums a large
array here. Above 100 %: weights that stay in the processor's cache. Medians and quartiles of interleaved runs.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.quantisation import Variant, dequantizing, factors, header, runs, sizes, written
from slrprop.fit.quantize import quantised
from slrprop.forms import Dense, Form, SparseLowRank
from slrprop.linalg import SVD

LAYERS = ["768x3072", "1024x4096", "4096x4096", "4096x11008", "25088x4096"]


def reading_rate(numbers: int = 1 << 27, repetitions: int = 7) -> float:
    """Bytes per second at which one thread reads memory: the best of some sums of half a gigabyte."""
    array, times = torch.ones(numbers), []
    for _ in range(repetitions):
        start = time.perf_counter()
        array.sum()
        times.append(time.perf_counter() - start)
    return 4 * numbers / min(times)


def slr(m: int, n: int, k: int) -> SparseLowRank:
    """SLR at rates 0.5, the neurons of its blocks in order."""
    low = factors(m, n, k)
    svd = SVD(low.left, torch.ones(k), low.right)
    return SparseLowRank.shorten(svd, k // 2, torch.arange(m) < m // 2, torch.arange(n) < n // 2)


def forms(m: int, n: int, parts: list[int]) -> list[tuple[str, Form, tuple[int, ...]]]:
    """Name, form and widths of numbers to measure it in."""
    found: list[tuple[str, Form, tuple[int, ...]]] = [("dense", Dense(torch.randn(m, n) / m**0.5), (32, 8, 4))]
    for part in parts:
        k = max(2, m * n // (part * (m + n)))
        found += [(f"SVD, k = {k}", factors(m, n, k), (32, 8, 4)), (f"SLR, k = {k}", slr(m, n, k), (32,))]
    return found


def variants_of(name: str, form: Form, bits: tuple[int, ...], folder: Path) -> dict[str, tuple[Variant, int]]:
    """Files of a form, and the bytes of weights that the loaded model reads at every run."""
    found: dict[str, tuple[Variant, int]] = {}
    for width in bits:
        few = form if width == 32 else quantised(form, width)
        path = folder / f"{name}{width}.onnx"
        written(path, few)
        found[f"{name}, {'float32' if width == 32 else f'{width} bits, Cast, Div'}"] = ((path, None), 4 * form.numbers)
        if width < 32:
            path = folder / f"{name}{width}n.onnx"
            dequantizing(path, few, joined=not isinstance(form, Dense))
            found[f"{name}, {width} bits, MatMulNBits"] = ((path, None), form.numbers * width // 8)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=LAYERS, metavar="MxN")
    parser.add_argument("--parts", type=int, nargs="+", default=[4, 16], help="the dense numbers over the SVD's")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rate = reading_rate()
    print(f"one thread reads {rate / 1e9:.1f} GB/s\n")
    timed = [name for batch in args.batches for name in (f"batch {batch}, ms", "faster")]
    header("layer", "stored as", "file, MB", "read, MB", *timed, f"of the limit, batch {args.batches[0]}")
    for layer in args.layers:
        m, n, _ = sizes(f"{layer}x1")
        with tempfile.TemporaryDirectory() as folder:
            made: dict[str, tuple[Variant, int]] = {}
            for name, form, bits in forms(m, n, args.parts):
                made |= variants_of(name, form, bits, Path(folder))
            files = {name: variant for name, (variant, _) in made.items()}
            times = [runs(files, torch.randn(batch, m).numpy(), args.turns) for batch in args.batches]
            dense = [statistics.median(found["dense, float32"]) for found in times]
            for name, (variant, read) in made.items():
                cells = []
                for found, whole in zip(times, dense, strict=True):
                    low, middle, high = (1e3 * value for value in statistics.quantiles(found[name], n=4))
                    cells += [f"{middle:.3g} ({low:.3g}-{high:.3g})", f"{1e3 * whole / middle:.2f}x"]
                share = read / statistics.median(times[0][name]) / rate
                print(f"| {layer} | {name} | {variant[0].stat().st_size / 1e6:.3g} | {read / 1e6:.3g} | {' | '.join(cells)} | {100 * share:.0f} % |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
