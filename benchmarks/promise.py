"""How often a promise of ``slrprop.compress`` holds on fresh samples, by what the samples given were.

    python -m benchmarks.promise [--data FOLDER] [--draws 20] [--networks mlp lenet] [--levels calibrated tuned] [--samples 2000]

MNIST. *mlp*: 784-512-512-10, *lenet*: LeNet-5, each trained once on the first 20 000 rows of the training file. A draw gives
``compress`` so many samples that are *seen* (rows the network was trained on), *held out* (other rows of the training file) or of the
*test file*, and asks for a drop of at most ``--max-drop``. What is really lost is then measured on rows that were not given: up to 20 000
held-out ones of the training file, and of the test file. So of each draw it is known:

- *budget*: whether the real drop, on rows of the file that was drawn from, is above what was asked;
- *interval*: whether it is outside the printed interval (seen samples: on held-out rows);
- *shift*: the same for rows of the other file.

Few forms are tried (low rank and dense in 4 bits), and tuning takes ``--epochs`` of 64 samples a step, which makes a draw seconds. Rows are kept in ``--run-dir``, one JSON line a draw, and
are not drawn again.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm, trange

from slrprop.errors import SlrpropError
from slrprop.research.datasets import Dataset, mnist
from slrprop.research.networks import LeNet5
from slrprop.search import compress
from slrprop.tune import TuneSettings

TRAIN, POOL = 20_000, 20_000
SOURCES = ("seen", "held out", "test file")
METHODS = [("low_rank", {"bits": 4}), ("dense", {"bits": 4})]
EPOCHS = {"mlp": 10, "lenet": 6}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    ),
    "lenet": LeNet5,
}


def trained(name: str, data: Dataset, folder: Path) -> nn.Module:
    """The network, trained once and kept."""
    torch.manual_seed(0)
    model, path = NETWORKS[name](), folder / f"{name}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    steps = EPOCHS[name] * math.ceil(TRAIN / 64)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(EPOCHS[name], desc=f"training {name}", unit="epoch"):
        for rows in torch.randperm(TRAIN).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.x_train[rows]), data.y_train[rows]).backward()
            optimizer.step()
            schedule.step()
    save_file(model.state_dict(), path)
    return model.eval()


def headed(name: str, model: nn.Module, data: Dataset, folder: Path) -> tuple[nn.Module, Dataset]:
    """LeNet's dense layers alone and the features that they read, kept too, since nothing before them changes; other networks as they are."""
    if not isinstance(model, LeNet5):
        return model, data
    path = folder / f"{name}-features.safetensors"
    if not path.exists():
        with torch.no_grad():
            splits = {"train": data.x_train, "test": data.x_test}
            save_file(
                {key: torch.cat([model.front(x) for x in split.split(2000)]) for key, split in splits.items()}, path
            )
    parts = load_file(path)
    return model.head().eval(), Dataset(parts["train"], data.y_train, parts["test"], data.y_test)


def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether each answer is right."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(2000)]) == y


def draw(model: nn.Module, data: Dataset, source: str, level: str, seed: int, given: dict[str, Any]) -> dict[str, Any]:
    """One promise, and what became of it."""
    random = torch.Generator().manual_seed(seed)
    x, y = (data.x_test, data.y_test) if source == "test file" else (data.x_train, data.y_train)
    start, end = {"seen": (0, TRAIN), "held out": (TRAIN, len(x)), "test file": (0, len(x))}[source]
    order = start + torch.randperm(end - start, generator=random)
    rows, rest = order[: given["samples"]], order[given["samples"] :][:POOL]
    fresh = {"held out": torch.arange(TRAIN, TRAIN + POOL), "test file": torch.arange(len(data.x_test))}
    fresh |= {source: rest} if source != "seen" else {}
    began = time.perf_counter()
    found = compress(
        model, (x[rows], y[rows]), max_drop=given["max_drop"], level=level, methods=METHODS, seed=seed,
        confident=given["confident"], tuning=TuneSettings(epochs=given["epochs"], batch=64),
    )  # fmt: skip
    real = {}
    for file, places in fresh.items():
        of = (data.x_test, data.y_test) if file == "test file" else (data.x_train, data.y_train)
        part = of[0][places], of[1][places]
        lost = right(model, *part).double() - right(found.model, *part).double()
        real[file] = 100 * float(lost.mean())
    return {
        "drop": found.drop, "interval": found.interval, "looks": getattr(found, "looks", 0), "bytes": found.bytes[1],
        "original": found.quality[0], "real": real, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def table(rows: list[dict[str, Any]], asked: float) -> Iterator[str]:
    """The rows of each network, level and source as a line of a Markdown table."""
    yield (
        "| network | level | samples given | draws | kB | looks | promised | real | real drop above the budget | outside the interval "
        "| other file: real | above its upper end |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for name, level, source in sorted({(row["network"], row["level"], row["source"]) for row in rows}):
        group = [row for row in rows if (row["network"], row["level"], row["source"]) == (name, level, source)]
        own, other = ("test file", "held out") if source == "test file" else ("held out", "test file")
        real, moved = ([row["real"][file] for row in group] for file in (own, other))
        outside = [not row["interval"][0] <= lost <= row["interval"][1] for row, lost in zip(group, real, strict=True)]
        beyond = [lost > row["interval"][1] for row, lost in zip(group, moved, strict=True)]

        def mean(values: Any) -> float:
            numbers = list(values)
            return sum(numbers) / len(numbers)

        yield (
            f"| {name} | {level} | {source} | {len(group)} | {mean(row['bytes'] for row in group) / 1e3:.1f} "
            f"| {mean(row['looks'] for row in group):.1f} | {mean(row['drop'] for row in group):.2f} | {mean(real):.2f} "
            f"| {sum(lost > asked for lost in real)} | {sum(outside)} | {mean(moved):.2f} | {sum(beyond)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/promise"))
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--max-drop", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--confident", action="store_true")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--levels", nargs="+", default=["calibrated", "tuned"])
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    args = parser.parse_args()
    args.run_dir.mkdir(parents=True, exist_ok=True)
    given = {"samples": args.samples, "max_drop": args.max_drop, "confident": args.confident, "epochs": args.epochs}
    log = args.run_dir / f"{args.samples}-{args.max_drop:g}{'-confident' * args.confident}.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(row["network"], row["level"], row["source"], row["seed"]) for row in rows}
    wanted = [
        (name, level, source, seed) for seed in range(args.draws) for name in args.networks for level in args.levels
        for source in args.sources
    ]  # fmt: skip
    data = mnist(args.data)
    cases = {name: headed(name, trained(name, data, args.run_dir), data, args.run_dir) for name in args.networks}
    for name, level, source, seed in tqdm([one for one in wanted if one not in known], unit="draw"):
        try:
            row = draw(*cases[name], source, level, seed, given)
        except SlrpropError as error:
            tqdm.write(f"{name}, {level}, {source}, {seed}: {error}")
            continue
        row |= {"network": name, "level": level, "source": source, "seed": seed}
        rows.append(row)
        with open(log, "a") as file:
            file.write(json.dumps(row) + "\n")
    print("\n".join(table([row for row in rows if row["seed"] < args.draws], args.max_drop)))


if __name__ == "__main__":
    main()
