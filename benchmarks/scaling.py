"""How the time to compress grows with layers, width, samples and workers.

    python -m benchmarks.scaling [--layers 2 4 8] [--widths 128 256 512 1024] [--samples 1000 4000 16000] [--workers 1 2]

Dense ReLU networks with random weights on MNIST images (the values do not matter for time), one thread in every process. Each part that
``slrprop.compress`` (level ``calibrated``) does is timed alone: *calibration*, one run for all layers' second moments and metrics;
*candidates* of all layers, shared by the workers; *a plan*, its layers fitted one after the other behind the compressed ones;
*an evaluation* of it. One thing is varied at a time, around 4 layers, 256 wide, 4000 samples, 1 worker; the exponent is the slope
of log time over log size between the two largest. With w workers the candidates take ``serial + parallel / w`` (Amdahl 1967), both parts
from the times of one and two workers: the rows *modelled* are that, not measured.
"""

import argparse
import math
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from benchmarks.quantisation import header
from slrprop.api import plan_problem
from slrprop.data import Data
from slrprop.methods import Problem
from slrprop.network import TorchNetwork
from slrprop.parallel import each
from slrprop.research.datasets import mnist
from slrprop.search.judge import Door, Judge
from slrprop.search.path import LEVELS, candidates_of, layer_inputs

USUAL = {"layers": 4, "width": 256, "samples": 4000, "workers": 1}
PARTS = ("calibration", "candidates", "a plan", "an evaluation")
MODELLED = (4, 8, 16)


def network(layers: int, width: int) -> nn.Sequential:
    """Dense layers of one width between images and ten classes."""
    torch.manual_seed(0)
    sides = [784, *[width] * layers, 10]
    parts = [part for m, n in pairwise(sides) for part in (nn.Linear(m, n), nn.ReLU())]
    return nn.Sequential(*parts[:-1]).eval()


def seconds(images: torch.Tensor, layers: int, width: int, samples: int, workers: int) -> dict[str, float]:
    """Time of every part."""
    model, data = network(layers, width), Data((images[:samples], None))
    problem = Problem(TorchNetwork(model, data), data)
    door, judge = Door(model, data), Judge(model, data, "agreement")
    names, found = problem.network.order[:-1], {}

    def timed(part, call):
        start = time.perf_counter()
        result = call()
        found[part] = time.perf_counter() - start
        return result

    timed("calibration", lambda: [problem.calibration.regression(name, {}) for name in names])
    shared = problem, layer_inputs(problem, names), dict.fromkeys(names, LEVELS["calibrated"])
    timed("candidates", lambda: list(each(candidates_of, names, shared, workers)))
    plan = timed("a plan", lambda: plan_problem(problem, "low_rank", list(names), rank=width // 8, bits=4))
    timed("an evaluation", lambda: judge.divergence(judge.outputs(door.realise(plan))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = mnist(args.data).x_train[:, 0, 2:30, 2:30].flatten(1).contiguous()
    header("layers", "width", "samples", "workers", *(f"{part}, s" for part in PARTS))
    varied = {"layers": args.layers, "width": args.widths, "samples": args.samples, "workers": args.workers}
    for what, values in varied.items():
        rows = {}
        for value in values:
            setting = USUAL | {what: value} | ({"layers": 8} if what == "workers" else {})
            rows[value] = seconds(images, **setting)
            print(f"| {' | '.join(map(str, setting.values()))} | {' | '.join(f'{rows[value][part]:.2f}' for part in PARTS)} |", flush=True)  # fmt: skip
        if what == "workers":
            one, two = (rows[count]["candidates"] for count in (1, 2))
            parallel = 2 * (one - two)
            for count in MODELLED:
                print(f"| 8 | {USUAL['width']} | {USUAL['samples']} | {count}, modelled | | {one - parallel + parallel / count:.2f} | | |")  # fmt: skip
        else:
            low, high = sorted(values)[-2:]
            exponents = [math.log(rows[high][part] / rows[low][part]) / math.log(high / low) for part in PARTS]
            print(f"| exponent of the {what} | | | | {' | '.join(f'{exponent:.1f}' for exponent in exponents)} |")


if __name__ == "__main__":
    main()
