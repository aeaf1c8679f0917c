"""Net-Trim against DDLR: which answer to the same constraints is smaller, and which more accurate.

    python -m benchmarks.net_trim_ddlr [--networks lenet5-mnist,lenet300-mnist] [--seeds 3] [--samples 3000]
        [--gains 0.02,...] [--bits 32] [--cut-weights 0]
        [--cut-ranks 1e-4] [--data FOLDER] [--run-dir runs/paper]

Both methods treat every layer by itself (V = 0, eps = gain ||Y||_F) with the same calibration samples, which are training
images without labels, with the same solver and tolerance; the last layer stays dense, since ten outputs are too few for low
rank to pay. Numbers and bytes are those of the treated weights: values with their scales, and for Net-Trim where they stand
(biases are as many for both and not counted). "plain" is the data-blind relative: magnitude pruning with as many weights, truncated SVD of the
same ranks, both with the original bias. Solutions are kept under the run folder.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slrprop.fit.admm import Programme, singular_value_threshold, soft_threshold, solve
from slrprop.fit.quantize import quantised
from slrprop.fit.regression import Regression
from slrprop.forms import Form, LowRank, Sparse
from slrprop.linalg import truncated_svd
from slrprop.research.experiments import COMPARED, Experiment, trained

GAINS = "0.02,0.05,0.1,0.15,0.2,0.3,0.4,0.5,0.6,0.7"
PROXIMAL = {"net_trim": soft_threshold, "ddlr": singular_value_threshold}
ITERATIONS, TOLERANCE = 1000, 1e-4
DROPS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0)  # points of accuracy


NETWORKS = {name: COMPARED[name] for name in ("lenet5-mnist", "lenet300-mnist")}


@dataclass
class Point:
    """What one setting gave: summed over the treated layers."""

    gain: float
    numbers: int
    bytes: int
    accuracy: float
    plain: float
    violation: float
    iterations: int
    seconds: float
    detail: str


def head(model: nn.Module, x: Tensor) -> Tensor:
    """Inputs of the first dense layer, float64."""
    return torch.cat([model.front(batch) for batch in x.split(1000)]).double()


def layers_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The dense chain: weight (m x n) and bias of every layer, float64."""
    return {
        name: (module.weight.T.double(), module.bias.double())
        for name, module in model.named_children()
        if isinstance(module, nn.Linear)
    }


def accuracy(layers: dict[str, tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> float:
    for index, (weight, bias) in enumerate(layers.values()):
        x = (x.relu() if index else x) @ weight + bias
    return float((x.argmax(1) == y).double().mean()) * 100


def cut(weight: Tensor, method: str, share: float) -> Sparse | LowRank:
    """The weight's form without what is below ``share`` of its largest entry or singular value."""
    if method == "net_trim":
        return Sparse.of(weight * (weight.abs() > share * weight.abs().max()))
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    rank = max(1, int((s > share * s[0]).sum()))
    return LowRank(u[:, :rank] * s[:rank], vt[:rank])


def stored(form: Sparse | LowRank, x: Tensor, bias: Tensor, bits: int) -> tuple[Form, Tensor]:
    """The form as it is stored, and its bias: rounding errors are made up for on the samples' covariance and mean."""
    if bits == 32:
        return form.with_matrices({key: matrix.float() for key, matrix in form.matrices().items()}), bias
    weight, mean = form.dense(), x.mean(0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    task = Regression(
        "", weight, weight, bias, mean, covariance, mean @ weight + bias, None, None, True, lambda: (x, x)
    )
    rounded = quantised(form, bits, task)
    return rounded, task.corrected_bias(rounded.dense().double())


def plain_of(weight: Tensor, form: Sparse | LowRank) -> Tensor:
    """Magnitude pruning with as many weights, or the truncated SVD of as many ranks."""
    if isinstance(form, LowRank):
        svd = truncated_svd(weight, form.left.shape[1])
        return svd.left @ svd.vt
    kept = weight.abs().flatten().topk(form.numbers).indices
    return torch.zeros_like(weight).flatten().index_copy(0, kept, weight.flatten()[kept]).reshape(weight.shape)


def solution(folder: Path, name: str, x: Tensor, z: Tensor, method: str, gain: float) -> dict[str, Tensor]:
    path = folder / f"{name}-{method}-gain{gain}-p{len(x)}.safetensors"
    if not path.exists():
        start = time.perf_counter()
        found = solve(
            Programme.parallel(x, z, True, gain), PROXIMAL[method], iterations=ITERATIONS, tolerance=TOLERANCE
        )
        seconds = time.perf_counter() - start
        folder.mkdir(parents=True, exist_ok=True)
        state = torch.tensor([*found.violation, found.iterations, seconds], dtype=torch.float64)
        save_file({"weight": found.weight.contiguous(), "bias": found.bias.contiguous(), "state": state}, path)
    return load_file(path)


@torch.no_grad()
def points(experiment: Experiment, seed: int, args: argparse.Namespace) -> tuple[float, dict[str, list[Point]]]:
    data = experiment.load_data(args.data)
    with torch.enable_grad():
        model = trained(experiment, seed, data, args.run_dir)
    drawn = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(seed))[: args.samples]
    x, x_test = head(model, data.x_train[drawn]), head(model, data.x_test)
    layers = layers_of(model)
    samples = {}
    for name, (weight, bias) in layers.items():
        samples[name] = (x, x @ weight + bias)
        x = samples[name][1].relu()
    dense = accuracy(layers, x_test, data.y_test)
    found: dict[str, list[Point]] = {method: [] for method in PROXIMAL}
    for gain in args.gains:
        for method in PROXIMAL:
            new, plain, numbers, size, details = dict(layers), dict(layers), 0, 0, []
            states = []
            for name in experiment.layers:
                weight, bias = layers[name]
                m, n = weight.shape
                part = solution(
                    args.run_dir.parent / "net_trim_ddlr",
                    f"{experiment.name}-seed{seed}-{name}",
                    *samples[name],
                    method,
                    gain,
                )
                form = cut(part["weight"], method, args.cut[method])
                kept, new_bias = stored(form, samples[name][0], part["bias"], args.bits)
                new[name] = (kept.dense().double(), new_bias)
                plain[name] = (plain_of(weight, form), bias)
                states.append(part["state"])
                numbers, size = numbers + min(form.numbers, m * n), size + min(kept.bytes, m * n * args.bits // 8)
                details.append(
                    f"rank {form.left.shape[1]}"
                    if isinstance(form, LowRank)
                    else f"{100 * form.numbers / (m * n):.1f} %"
                )
            state = torch.stack(states)
            found[method].append(
                Point(
                    gain,
                    numbers,
                    size,
                    accuracy(new, x_test, data.y_test),
                    accuracy(plain, x_test, data.y_test),
                    float(state[:, :2].max()),
                    int(state[:, 2].max()),
                    float(state[:, 3].sum()),
                    ", ".join(details),
                )
            )
            print(f"<!-- {experiment.name} seed {seed} {method} {found[method][-1]} -->", flush=True)
    return dense, found


def at(known: list[float], values: list[float], where: float) -> float:
    """Piecewise linear through (known, values); not a number outside."""
    order = np.argsort(known)
    return float(np.interp(where, np.array(known)[order], np.array(values)[order], left=np.nan, right=np.nan))


def smallest(found: list[Point], what: str, least: float) -> float:
    """Fewest numbers or bytes at which the accuracy stays at or above ``least``, between points on a line in the logarithm."""
    by_size = sorted(found, key=lambda point: getattr(point, what))
    above = next((i for i in range(len(by_size)) if all(p.accuracy >= least for p in by_size[i:])), None)
    if not above:
        return float("nan")  # never, or already at the smallest point
    low, high = by_size[above - 1], by_size[above]
    share = (least - low.accuracy) / (high.accuracy - low.accuracy)
    low_size, high_size = max(getattr(low, what), 1), max(getattr(high, what), 1)
    return float(low_size * (high_size / low_size) ** share)


def mean(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    known = np.array(values)
    if np.isnan(known).any():
        return "-"
    spread = f" ± {known.std(ddof=1):,.{digits}f}" if len(known) > 1 else ""
    return f"{known.mean():,.{digits}f}{spread}"


def report(name: str, dense: list[float], runs: list[dict[str, list[Point]]]) -> None:
    print(f"\n### {name}: dense {mean(dense)} %, {len(runs)} seeds\n")
    print(
        "| gain | method | kept (seed 0) | numbers | bytes | accuracy, % | plain, % | violation | iterations | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for index, first in enumerate(runs[0]["net_trim"]):
        for method in PROXIMAL:
            same = [run[method][index] for run in runs]
            cells = [
                f"{first.gain}", method, same[0].detail, mean([p.numbers for p in same], 0), mean([p.bytes for p in same], 0),
                mean([p.accuracy for p in same]), mean([p.plain for p in same]), f"{max(p.violation for p in same):.0e}",
                str(max(p.iterations for p in same)), f"{np.mean([p.seconds for p in same]):.0f}",
            ]  # fmt: skip
            print(f"| {' | '.join(cells)} |")
    print("\nSmallest size at which at most so many points are lost (between measured points, in the logarithm):\n")
    print("| points lost | numbers, Net-Trim | numbers, DDLR | bytes, Net-Trim | bytes, DDLR |")
    print("|---|---|---|---|---|")
    for drop in DROPS:
        cells = [
            mean([smallest(run[method], what, base - drop) for base, run in zip(dense, runs, strict=True)], 0)
            for what in ("numbers", "bytes")
            for method in PROXIMAL
        ]
        print(f"| {drop} | {' | '.join(cells)} |")
    for what in ("numbers", "bytes"):
        print(f"\nAccuracy at equal {what} (between measured points, in the logarithm), %:\n")
        print(f"| {what} | Net-Trim | DDLR | DDLR - Net-Trim |")
        print("|---|---|---|---|")
        curves = {m: [[np.log(max(getattr(p, what), 1)) for p in run[m]] for run in runs] for m in PROXIMAL}
        low = max(min(curve) for curves_ in curves.values() for curve in curves_)
        high = min(max(curve) for curves_ in curves.values() for curve in curves_)
        for where in np.linspace(low, high, 7):
            got = {
                m: [at(c, [p.accuracy for p in run[m]], where) for c, run in zip(curves[m], runs, strict=True)]
                for m in PROXIMAL
            }
            difference = [b - a for a, b in zip(got["net_trim"], got["ddlr"], strict=True)]
            print(f"| {np.exp(where):,.0f} | {mean(got['net_trim'])} | {mean(got['ddlr'])} | {mean(difference)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--gains", default=GAINS, type=lambda text: [float(gain) for gain in text.split(",")])
    parser.add_argument("--bits", type=int, default=32, choices=(32, 8, 4), help="of every stored number")
    parser.add_argument("--cut-weights", type=float, default=0.0, help="drop weights below this share of the largest")
    parser.add_argument("--cut-ranks", type=float, default=TOLERANCE, help="the same for singular values")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/paper"))
    args = parser.parse_args()
    args.cut = {"net_trim": args.cut_weights, "ddlr": args.cut_ranks}
    print(
        f"{args.samples} samples, tolerance {TOLERANCE}, at most {ITERATIONS} iterations, {torch.get_num_threads()} threads"
    )
    for name in args.networks.split(","):
        dense, runs = zip(*(points(NETWORKS[name], seed, args) for seed in range(args.seeds)), strict=True)
        report(name, list(dense), list(runs))


if __name__ == "__main__":
    main()
