"""Nested sparse low rank: which levels are best, and what the sweeps that refit every block bring.

    python -m benchmarks.nested [--network lenet5-mnist] [--bytes 2.9kB 4.4kB 8.7kB] [--bits 4 32] [--seeds 3]

Every shape of ``slrprop.methods.nested.SHAPES`` (two sweeps), low rank (one level) and sparse low rank refitted (two levels, SLR's
sets by weight) at equal stored bytes of the treated layers, the bytes shared among layers by the search that
``slrprop compare`` uses. Divergence (Kullback-Leibler from the original's outputs) of the 10 000 calibration samples, by
which shapes are judged, and accuracy on the test set, means over networks of different seeds. Second table: the shapes
that ``auto`` tries after 0, 1, 2 and 6 sweeps. Networks are trained where they are not in ``--run-dir``.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm.auto import tqdm

from slrprop.api import apply
from slrprop.methods.nested import SHAPES
from slrprop.research.comparison.contenders import SHAPES as TRIED
from slrprop.research.comparison.contenders import Contender
from slrprop.research.comparison.run import Bench, plans_of
from slrprop.research.experiments import COMPARED
from slrprop.search.result import parse_size
from slrprop.tune import distance

SWEEPS = (0, 1, 2, 6)
Row = tuple[float, float, float]  # divergence, accuracy in percent, seconds


def contenders(bits: int) -> list[Contender]:
    """One per shape, and per shape that auto tries and number of sweeps."""
    few = {} if bits == 32 else {"bits": bits}
    made = [
        Contender("one level (low rank)", "calibrated", (("low_rank", few),)),
        Contender("SLR's sets, refitted", "calibrated", (("slr_refit", {"criterion": "weight"} | few),)),
    ]
    settings = [(shape, 2) for shape in SHAPES] + [(shape, n) for shape in TRIED for n in SWEEPS if n != 2]
    return made + [
        Contender(f"{shape}, {n} sweeps", "calibrated", (("nested", {"shape": shape, "sweeps": n} | few),))
        for shape, n in settings
    ]


def measured(bench: Bench, contender: Contender, sizes: list[int]) -> dict[int, Row]:
    """The contender at every size that it reaches."""
    found, start = {}, time.perf_counter()
    inputs = torch.cat([batch.inputs[0] for batch in bench.calibration])
    for size, plan, _ in plans_of(bench, contender, sizes):
        model = apply(bench.head, plan)
        with torch.no_grad():
            divergence = float(distance(model(inputs), bench.head(inputs), 1.0))
            accuracy = 100 * float((model(bench.x_test).argmax(1) == bench.data.y_test).double().mean())
        found[size] = divergence, accuracy, time.perf_counter() - start
    return found


def cell(rows: list[Row]) -> str:
    """Divergence in thousandths and accuracy."""
    if not rows:
        return "-"
    divergences, accuracies, _ = zip(*rows, strict=True)
    return f"{1e3 * statistics.mean(divergences):.1f} / {statistics.mean(accuracies):.2f}"


def table(names: dict[str, str], sizes: list[int], rows: dict[tuple[str, int], list[Row]]) -> str:
    """Markdown, one line per contender."""
    lines = [
        f"| levels | {' | '.join(f'{size / 1e3:.1f} kB' for size in sizes)} | seconds |",
        "|---" * (len(sizes) + 2) + "|",
    ]
    for name, title in names.items():
        spent = [rows[name, size][-1][2] for size in sizes if rows[name, size]]
        cells = " | ".join(cell(rows[name, size]) for size in sizes)
        lines.append(f"| {title} | {cells} | {max(spent, default=float('nan')):.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="lenet5-mnist", choices=sorted(COMPARED))
    parser.add_argument("--bytes", nargs="+", default=["2.9kB", "4.4kB", "8.7kB"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 32])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", default=None)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/compare"))
    given = parser.parse_args()
    experiment = COMPARED[given.network]
    data = experiment.load_data(given.data)
    rows: dict[int, dict[tuple[str, int], list[Row]]] = {bits: defaultdict(list) for bits in given.bits}
    sizes: list[int] = []
    with tqdm(total=given.seeds * sum(len(contenders(bits)) for bits in given.bits), unit="contender") as bar:
        for seed in range(given.seeds):
            bench = Bench(experiment, seed, data, given.run_dir)
            total = experiment.stored(bench.head)[0]
            sizes = sorted({parse_size(size, total, "--bytes") for size in given.bytes})
            for bits in given.bits:
                for contender in contenders(bits):
                    bar.set_postfix_str(f"seed {seed}, {contender.name}, {bits} bits")
                    for size, row in measured(bench, contender, sizes).items():
                        rows[bits][contender.name, size].append(row)
                    bar.update()
    print(f"{given.network}, {given.seeds} seeds, {torch.get_num_threads()} threads: divergence x 1000 / accuracy, %")
    for bits in given.bits:
        names = [contender.name for contender in contenders(bits)]
        plain = {name: name.removesuffix(", 2 sweeps") for name in names if not name.endswith("sweeps") or name.endswith(", 2 sweeps")}  # fmt: skip
        swept = {f"{shape}, {n} sweeps": f"{shape}, {n} sweep{'s' * (n != 1)}" for shape in TRIED for n in SWEEPS}
        for title, chosen in (("levels", plain), ("sweeps", swept)):
            print(f"\n{bits} bits, {title}\n\n{table(chosen, sizes, rows[bits])}")


if __name__ == "__main__":
    main()
