"""How long searches and commands take, in seconds of processor and of clock, against another version of the code.

    python -m benchmarks.speed [--against FOLDER] [--cases demo mnist ...] [--threads 1 2] [--turns 3] [--data FOLDER]
    python -m benchmarks.speed --paths [--data FOLDER]

*demo*: README's first ``compress`` (64-768-768-768-10, 797 samples; ``slrprop demo`` makes its files). *mnist-...*: 784-512-512-10 trained for three epochs,
2 000 samples, within 40 and 5 % of its bytes and half a point. *resnet20*: the committed network, 512 images, half a point. *inspect*: a file of 5 MB;
*help*, *import*. Each in a process of its own, versions in turn; ``--against`` names the ``src`` folder of another version. The least of the turns counts.

*--paths*: the path of plans with foretold errors beside the one with every step of every ladder fitted: predicted damage at equal bytes.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import slrprop
from benchmarks.quantisation import header
from slrprop.data import Data
from slrprop.methods import Problem
from slrprop.network import open_network
from slrprop.search import path
from slrprop.search.judge import Door, Judge, Log
from slrprop.search.path import LEVELS, Candidate, path_of
from slrprop.search.shares import Shares
from slrprop.search.trials import Trials

SMALLEST = 1e-4  # predicted damage below which no task tells plans apart
COMMANDS = {"help": ["--help"], "inspect": ["inspect", "{folder}/demo.onnx"], "import": []}
BUDGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "demo": ("demo", {"max_drop": 0.5}),
    "mnist-40%": ("mnist", {"max_bytes": "40%"}),
    "mnist-5%": ("mnist", {"max_bytes": "5%"}),
    "mnist-drop": ("mnist", {"max_drop": 0.5}),
    "resnet20": ("resnet20", {"max_drop": 0.5}),
}
CHILD = """
import json, resource, sys, time
start = time.perf_counter()
import slrprop
found = slrprop.compress(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([used.ru_utime + used.ru_stime, time.perf_counter() - start, found.bytes[1], found.drop]))
"""


def dense(*sizes: int) -> nn.Sequential:
    """Dense layers with ReLU between."""
    parts = [part for m, n in itertools.pairwise(sizes) for part in (nn.Linear(m, n), nn.ReLU())]
    return nn.Sequential(*parts[:-1])


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int = 3) -> nn.Module:
    """A network after a few epochs of Adam."""
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


def files(name: str, folder: Path, data: Path | None) -> tuple[Path, Path]:
    """A case's ONNX file and its samples."""
    model, samples = folder / f"{name}.onnx", folder / f"{name}.npz"
    if model.exists():
        return model, samples
    torch.manual_seed(0)
    network: nn.Module
    if name == "demo":
        from sklearn.datasets import load_digits

        x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
        x = x.float() / 16
        network = trained(dense(64, 768, 768, 768, 10), x[:1000], y[:1000], epochs=60)
        x, y = x[1000:], y[1000:]
    elif name == "resnet20":
        from benchmarks.resnet import trained as committed
        from slrprop.research.datasets import DATASETS

        found = DATASETS["cifar10"](data)
        network, x, y = committed(), found.x_train[:512], found.y_train[:512]
    else:
        from slrprop.research.datasets import DATASETS

        found = DATASETS["mnist"](data)
        network = trained(nn.Sequential(nn.Flatten(), *dense(1024, 512, 512, 10)), found.x_train, found.y_train)
        x, y = found.x_test[:2000], found.y_test[:2000]
    slrprop.export_onnx(network, model, x[:4])
    np.savez(samples, x=x.numpy(), targets=y.numpy())
    return model, samples


def seconds(name: str, source: str, threads: int, folder: Path, data: Path | None) -> list[float]:
    """Processor and clock seconds of a case with the code in ``source``; of a search also its bytes and drop."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    given = os.environ | limits | {"PYTHONPATH": source}
    if name in BUDGETS:
        case, budget = BUDGETS[name]
        arguments = [sys.executable, "-c", CHILD, *map(str, files(case, folder, data)), json.dumps(budget)]
        return json.loads(subprocess.run(arguments, env=given, capture_output=True, check=True, text=True).stdout)
    files("demo", folder, data)
    command = [part.format(folder=folder) for part in COMMANDS[name]]
    code = (
        f"import sys; sys.argv = ['slrprop', *{command}]; from slrprop.cli import main; main()"
        if command
        else "import slrprop"
    )
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, check=True)
    after, wall = os.times(), time.perf_counter() - start
    return [after.children_user + after.children_system - before.children_user - before.children_system, wall]


def shares_of(model: Any, data: Any, every: bool) -> Shares:
    """The layers' candidates of the level calibrated, foretold or ``every`` one fitted."""
    opened, far = Data(data), path.FAR
    trials = Trials(Door(model, opened), Judge(model, opened, None), Log(None))
    found = Shares(
        trials,
        Problem(open_network(model, opened), opened),
        LEVELS["calibrated"],
        tolerance=-1.0 if every else path.TOLERANCE,
    )
    path.FAR = math.inf if every else far
    try:
        found.explore(None)
    finally:
        path.FAR = far
    return found


def excess(told: Shares, every: Shares) -> Iterator[float]:
    """Of every point on the foretold path how many times the damage that all fits allow in as many bytes, by the errors of the fits."""

    def key(candidate: Candidate) -> str:
        return (
            "" if candidate.layer is None else candidate.layer.method + repr(sorted(candidate.layer.settings.items()))
        )

    fits = {name: {key(candidate): candidate for candidate in curve} for name, curve in every.curves.items()}
    curves = {name: [c for c in curve if key(c) in fits[name]] for name, curve in told.curves.items()}
    points = {}
    for kind, candidates in (("every", every.curves), ("told", curves)):
        points[kind] = []
        for point in path_of(candidates, every.sensitivity, (), 0):
            chosen = {layer.name: key(Candidate(0, 0.0, layer)) for layer in point.plan.layers}
            now = [fits[name][chosen.get(name, "")] for name in fits]
            damage = sum(every.sensitivity[name] * c.error for name, c in zip(fits, now, strict=True))
            points[kind].append((sum(c.bytes for c in now), damage))
    sizes, damages = np.array(points["every"][::-1]).T
    for size, damage in points["told"]:
        if damage > SMALLEST:
            yield damage / math.exp(np.interp(size, sizes, np.log(np.maximum(damages, 1e-12))))


def paths(networks: Sequence[tuple[str, Any, Any]]) -> None:
    """Print how far the foretold path is above the one of all fits."""
    header("network", "candidates", "points", "damage at equal bytes, mean", "worst")
    for name, model, data in networks:
        told, every = (shares_of(model, data, every) for every in (False, True))
        rows = list(excess(told, every))
        print(f"| {name} | {sum(len(curve) - 1 for curve in every.curves.values())} | {len(rows)} | {np.mean(rows):.3f} | {max(rows):.3f} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against")
    parser.add_argument("--cases", nargs="+", default=[*BUDGETS, *COMMANDS], choices=[*BUDGETS, *COMMANDS])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--paths", action="store_true")
    args = parser.parse_args()
    own = str(Path(slrprop.__file__).parents[1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.paths:
            paths([(case, str(model), str(data)) for case in ("demo", "mnist", "resnet20") for model, data in [files(case, folder, args.data)]])  # fmt: skip
            return
        header("case", "threads", "processor, s", "clock, s", "bytes", "drop", *(["processor, times less", "clock, times less", "bytes before"] if args.against else []))  # fmt: skip
        for case in args.cases:
            for threads in args.threads:
                taken: dict[str, list[list[float]]] = {own: []} | ({args.against: []} if args.against else {})
                for _ in range(args.turns):
                    for source in taken:
                        taken[source].append(seconds(case, source, threads, folder, args.data))
                least = {source: [min(column) for column in zip(*rows, strict=True)] for source, rows in taken.items()}
                now, told = least[own], [f"{value:.2f}" for value in least[own][:2]]
                told += [f"{now[2]:,.0f}", f"{now[3]:.2f}"] if len(now) > 2 else ["", ""]
                if args.against:
                    then = least[args.against]
                    told += [
                        f"{then[0] / now[0]:.2f}",
                        f"{then[1] / now[1]:.2f}",
                        f"{then[2]:,.0f}" if len(then) > 2 else "",
                    ]
                print("| " + " | ".join([case, str(threads), *told]) + " |", flush=True)


if __name__ == "__main__":
    main()
