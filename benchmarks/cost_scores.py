"""Exact cost scores against re-evaluating the network once per neuron, on the article's networks.

    python -m benchmarks.cost_scores [--rank 8] [--data FOLDER] [--run-dir runs/paper] [--naive-neurons 12]

Both start from the same trained network and the same calibration samples in memory. *Scores* is the time of the
scores given the layer's inputs; *with the pass* adds the one run of the network that provides them. The naive time is
that of a sample of neurons, spread over both sides, times the number of neurons ("extrapolated"); its evaluations run
the whole calibration set as one batch.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import torch

from slrprop.api import plan
from slrprop.checks import share
from slrprop.data import Data
from slrprop.linalg import truncated_svd
from slrprop.losses import loss_point
from slrprop.network.torch.network import TorchNetwork
from slrprop.relevance.changes import Walk, chain_changes
from slrprop.relevance.cost import cost_scores
from slrprop.research.experiments import EXPERIMENTS, trained
from tests.oracle import naive_cost

CASES = (("lenet5-mnist", "fc4"), ("lenet5-mnist", "fc3"), ("room-mlp", "fc3"), ("room-mlp", "fc2"))


def median_of(repetitions: int, run):
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        result = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def given_inputs(network, flow, layer, svd, reduced, inputs=True):
    """The summed changes of both sides, or the outputs alone, of all samples of a flow with labels."""
    x, chain = flow.calls[layer][0][0], network.chain(layer)
    z = chain.values((x @ svd.left) @ svd.vt + network.bias(layer))
    point = loss_point("cross_entropy", z[-1], flow.batch.targets, flow.output)
    return chain_changes(x, svd, reduced, Walk(chain, z, point), inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/paper"))
    parser.add_argument("--naive-neurons", type=int, default=12)
    args = parser.parse_args()
    reduced = share(args.rank, 0.5)
    print(f"rank {args.rank}, reduced rank {reduced}, float32, {torch.get_num_threads()} threads")
    print(
        "| network | layer | neurons | samples | scores, s | with the pass, s | naive, s (extrapolated) | naive / scores | naive / with the pass | largest difference |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    slrprop_cost: dict[str, float] = {}
    for name, layer in CASES:
        experiment = EXPERIMENTS[name]
        data = experiment.load_data(args.data)
        model = trained(experiment, 0, data, args.run_dir)
        drawn = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))[: experiment.calibration]
        x, y = data.x_train[drawn], data.y_train[drawn]
        calibration = Data((x, y))
        network = TorchNetwork(model, calibration)
        svd = truncated_svd(network.weight(layer), args.rank)
        flow = next(iter(network.stream((layer,), Data((x, y), len(x)))))

        def scores(network=network, flow=flow, layer=layer, svd=svd):
            return given_inputs(network, flow, layer, svd, reduced)

        scores()
        alone, _ = median_of(5, scores)
        whole, found = median_of(3, lambda n=network, c=calibration, i=layer, s=svd: cost_scores(n, c, i, s, reduced))
        m, n = network.weight(layer).shape
        half = args.naive_neurons // 2
        rows, columns = (torch.linspace(0, size - 1, half).long().tolist() for size in (m, n))
        stamps: list[float] = []
        naive = naive_cost(
            model,
            network.modules[layer],
            svd,
            reduced,
            x,
            y,
            rows=rows,
            columns=columns,
            tick=lambda s=stamps: s.append(time.perf_counter()),
        )
        # stamps: before the base evaluation and before every neuron's
        per_neuron = statistics.median(b - a for a, b in itertools.pairwise(stamps))
        total = per_neuron * (m + n)
        slrprop_cost[name] = slrprop_cost.get(name, 0.0) + total
        difference = max(
            float((found.rows[rows] - naive[0]).abs().max()), float((found.columns[columns] - naive[1]).abs().max())
        )
        print(
            f"| {name} | {layer} {m}x{n} | {m + n} | {len(x)} | {alone:.3f} | {whole:.3f} | {total:.0f} | {total / alone:.0f}x | {total / whole:.0f}x | {difference:.1e} |",
            flush=True,
        )
    for name, naive_total in slrprop_cost.items():
        experiment = EXPERIMENTS[name]
        data = experiment.load_data(args.data)
        model = trained(experiment, 0, data, args.run_dir)
        drawn = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))[: experiment.calibration]
        pair = (data.x_train[drawn], data.y_train[drawn])
        seconds, _ = median_of(
            3, lambda m=model, p=pair, e=experiment: plan(m, p, "slrprop", layers=list(e.layers), rank=args.rank)
        )
        print(
            f"\nSLRProp plan of {name}, both layers, SVD included: {seconds:.2f} s; naive costs of both layers alone {naive_total:.0f} s: {naive_total / seconds:.0f}x"
        )


if __name__ == "__main__":
    main()
