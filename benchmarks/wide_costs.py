"""Exact cost scores of layers of thousands of neurons, against what else such a layer costs.

    python -m benchmarks.wide_costs [--network vgg16-cifar10] [--rank 8] [--data FOLDER] [--run-dir runs/paper] [--naive-neurons 4]
                                   [--device cpu]

The two consecutive layers of an experiment, its calibration samples' features in memory. *exact*: the scores of a side, given the layer's inputs and the network's
outputs (rows: what they take beyond the columns); with *the pass* that provides these, the time of both sides is told below. Beside it: *naive*, one evaluation of the dense
head per neuron, of a few neurons and extrapolated; *limit*, the multiplications of the formula over this machine's rate of float32 matrix products of 4096 x 4096.
The formula: along a chain of layers of n_0, n_1, ... units, p samples, r lost ranks and c outputs, the rows of an m x n_0 layer take ``p r (sum n_t n_t+1 + m c)``, its
columns ``p n_0 n_1 c`` (``p n_0 c`` where the next layer gives the outputs): inactive units are not taken into account, so that skipping them can beat it.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import torch

from benchmarks.cost_scores import given_inputs, median_of
from benchmarks.quantisation import header
from slrprop.checks import share
from slrprop.data import Data
from slrprop.linalg import truncated_svd
from slrprop.network import TorchNetwork
from slrprop.relevance.cost import cost_scores
from slrprop.relevance.simple import weight_scores
from slrprop.research.bench import Bench
from slrprop.research.experiments import EXPERIMENTS
from tests.oracle import naive_cost


def rate(device: str, size: int = 4096) -> float:
    """Multiplications per second of float32 matrix products."""
    a, b = torch.randn(2, size, size, device=device)
    return size**3 / min(median_of(1, lambda: a @ b)[0] for _ in range(5))


def multiplications(widths: list[int], samples: int, lost: int, inputs: int) -> tuple[int, int]:
    """Of the formula, for rows and columns of a layer with ``widths`` outputs at and after it."""
    between, outputs = sum(a * b for a, b in itertools.pairwise(widths)), widths[-1]
    columns = widths[0] * outputs * (widths[1] if len(widths) > 2 else 1)
    return samples * lost * (between + inputs * outputs), samples * columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--network", default="vgg16-cifar10", choices=[name for name, e in EXPERIMENTS.items() if e.wide]
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/paper"))
    parser.add_argument("--naive-neurons", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    experiment, reduced = EXPERIMENTS[args.network], share(args.rank, 0.5)
    bench = Bench(experiment, 0, experiment.load_data(args.data), args.run_dir)
    before, frl = experiment.layers
    pairs = ((b.inputs[0].to(args.device), b.targets.to(args.device)) for b in bench.calibration)
    x, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    calibration, head = Data((x, labels)), bench.head.to(args.device)
    network = TorchNetwork(head, calibration)
    speed, names = rate(args.device), list(head.names)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{args.network}, {len(x)} samples, rank {args.rank} of which {args.rank - reduced} lost, {where}, {speed / 1e9:.0f} billion multiplications a second\n"
    )
    header(
        "layer",
        "side",
        "neurons",
        "exact, s",
        "naive, s",
        "naive / exact",
        "limit, s",
        "exact / limit",
        "largest difference",
    )
    naive_total, slrprop, svds, below = 0.0, 0.0, [], []
    for layer in (frl, before):
        weight, (m, n) = network.weight(layer), network.shape(layer)
        svd, given = truncated_svd(weight, args.rank), (network, calibration, layer)
        cost_scores(network, Data((x[:70], labels[:70])), layer, svd, reduced)  # compiled loops are compiled once
        whole, scores = median_of(1, lambda g=given, s=svd: cost_scores(*g, s, reduced))
        flow = next(iter(network.stream((layer,), Data((x, labels), len(x)))))
        seen = network, flow, layer, svd, reduced
        columns, _ = median_of(1, lambda seen=seen: given_inputs(*seen, inputs=False))
        both, _ = median_of(1, lambda seen=seen: given_inputs(*seen))
        half = args.naive_neurons // 2
        some = [torch.linspace(0, side - 1, half).long().tolist() for side in (m, n)]
        stamps: list[float] = []
        naive = naive_cost(
            head, network.modules[layer], svd, reduced, x, labels, rows=some[0], columns=some[1],
            tick=lambda s=stamps: s.append(time.perf_counter()),
        )  # fmt: skip
        each = statistics.median(b - a for a, b in itertools.pairwise(stamps))
        widths = [network.shape(name)[1] for name in names[names.index(layer) :]]
        limits = multiplications(widths, len(x), args.rank - reduced, m)
        times, sides = (both - columns, columns), ("rows", "columns")
        for side, exact, count, limit, found, want, at in zip(
            sides, times, (m, n), limits, scores, naive, some, strict=False
        ):
            apart = float((found[at].cpu() - want).abs().max())
            print(f"| {layer} {m}x{n} | {side} | {count} | {exact:.2f} | {count * each:.0f} | {count * each / exact:.0f}x | {limit / speed:.2f} | {exact * speed / limit:.1f} | {apart:.1e} |", flush=True)  # fmt: skip
        below.append(f"{layer}: both sides with the pass {whole:.1f} s")
        slrprop, naive_total = (
            slrprop + (both if layer == frl else columns),
            naive_total + each * (m + n if layer == frl else n),
        )
        by_weight, full = (
            median_of(3, lambda w=weight: weight_scores(w))[0],
            median_of(1, lambda w=weight: torch.linalg.svd(w, full_matrices=False))[0],
        )
        svds.append(f"{layer}: weight criterion {1e3 * by_weight:.0f} ms, full SVD {full:.1f} s")
    print(f"\n{'; '.join(below + svds)}\n")
    print(f"SLRProp's scores (both sides of {frl}, the columns of {before}, its rows by one product with a vector, not timed): {slrprop:.1f} s, {naive_total / slrprop:.0f} times as fast as naive")  # fmt: skip


if __name__ == "__main__":
    main()
