"""Speed of one dense layer in its stored forms, against the dense layer, in torch and ONNX Runtime.

    python -m benchmarks.inference [--repetitions 40] [--batches 1 32 256] [--ranks 16 64 256]

1 thread, float32, random weights (the values do not matter for speed). Rates 0.5. "SLR" has its neurons ordered, as
``slrprop.apply`` leaves them between element-wise or dense neighbours; "SLR gathered" stands alone, so that
its sets are gathered and its outputs put back in order. "SVD 0.75 k" has as many numbers as the SLR form. Medians of
interleaved repetitions; the dense time is given, the others as times faster.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from slrprop.export import export_onnx
from slrprop.forms import Dense, Fit, Form, LowRank, SparseLowRank
from slrprop.latency import latencies
from slrprop.linalg import SVD
from slrprop.network.torch.modules import layer_from

SHAPES = ((4096, 4096), (512, 4096))


def random_svd(m: int, n: int, k: int) -> SVD:
    return SVD(torch.randn(m, k) / m**0.5, torch.ones(k), torch.randn(k, n) / n**0.5)


def forms(m: int, n: int, k: int) -> dict[str, Form]:
    svd = random_svd(m, n, k)
    rows, columns = torch.randperm(m) < m // 2, torch.randperm(n) < n // 2
    gathered = SparseLowRank.shorten(svd, k // 2, rows, columns)
    ordered = gathered.permuted(rows.long().argsort(stable=True), columns.long().argsort(stable=True))
    return {
        "dense": Dense(torch.randn(m, n) / m**0.5),
        "SVD": LowRank.from_svd(svd),
        "SVD 0.75 k": LowRank.from_svd(random_svd(m, n, 3 * k // 4)),
        "SLR": ordered,
        "SLR gathered": gathered,
    }


def torch_times(layers: dict[str, nn.Module], x: torch.Tensor, repetitions: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in layers}
    with torch.inference_mode():
        for repetition in range(repetitions + 3):
            for name, layer in layers.items():
                start = time.perf_counter()
                layer(x)
                if repetition >= 3:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256])
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = ["SVD", "SVD 0.75 k", "SLR", "SLR gathered"]
    print("| runtime | shape | k | batch | dense, ms | " + " | ".join(names) + " |")
    print("|" + "---|" * (5 + len(names)))
    for m, n in SHAPES:
        for k in args.ranks:
            layers = {name: layer_from(Fit(form).over(torch.randn(n))).eval() for name, form in forms(m, n, k).items()}
            with tempfile.TemporaryDirectory() as folder:
                files = {name: Path(folder) / f"{index}.onnx" for index, name in enumerate(layers)}
                for name, path in files.items():
                    export_onnx(layers[name], path, torch.randn(4, m))
                for batch in args.batches:
                    x = torch.randn(batch, m)
                    measured = {
                        "torch": torch_times(layers, x, args.repetitions),
                        "onnxruntime": latencies(files, [x.numpy()], args.repetitions),
                    }
                    for runtime, times in measured.items():
                        faster = " | ".join(f"{times['dense'] / times[name]:.1f}x" for name in names)
                        print(
                            f"| {runtime} | {m}x{n} | {k} | {batch} | {1e3 * times['dense']:.2f} | {faster} |",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
