"""Permuted features (Nagaraju, Chandrachoodan 2023): fitted to trained networks, trained from scratch, as a head, counted.

    python -m benchmarks.permuted [--parts files fitted trained transfer counted] [--data FOLDER] [--run-dir runs/paper]

*fitted*: the method ``permuted`` on LeNet-5 and the room network. *trained*: LeNet-5 (3 seeds) and the room network
(1 seed) trained from scratch with permuted dense layers, beside the same network dense, and one so narrow that it has as
many numbers. *transfer*: the convolutions of a LeNet-5 trained on the digits 0 to 4, frozen; heads trained on few samples
of the digits 5 to 9. *files*: size and loading of ONNX files. *counted*: parameters of published architectures, from the shapes of their layers.
Prints Markdown tables; 1 thread.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import slrprop
from slrprop.fit.quantize import bias_in_few_bits, quantised
from slrprop.forms import Fit
from slrprop.forms.permutations import packed_bytes
from slrprop.network.torch.modules import layer_from
from slrprop.network.torch.network import stored_numbers, swapped
from slrprop.research.experiments import EXPERIMENTS, trained
from slrprop.research.networks import LeNet5, RoomMLP
from slrprop.research.permuted import PermutedLinear, permute, train
from slrprop.research.training import fit
from slrprop.storage import size_of

SEEDS = (0, 1, 2)


class Shuffled:
    """Batches of samples with labels, in a new random order each time."""

    def __init__(self, x: Tensor, y: Tensor, batch: int) -> None:
        self.x, self.y, self.batch = x, y, batch

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.x)).split(self.batch):
            yield self.x[chosen], self.y[chosen]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.inference_mode():
        return 100 * torch.cat([model(part).argmax(1) == own for part, own in zip(x.split(1000), y.split(1000), strict=True)]).float().mean().item()  # fmt: skip


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head(*names: str) -> None:
    row(*names)
    print("|" + "---|" * len(names))


class Narrow(LeNet5):
    """LeNet-5 whose dense part is 400-width-classes."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__(classes)
        self.fc3, self.fc4, self.fc5 = nn.Linear(400, width), nn.Identity(), nn.Linear(width, classes)


def dense_part(model: nn.Module) -> tuple[int, int]:
    """Numbers and bytes of the parts called fc..., biases, seeds and permutations counted."""
    parts = [part for name, part in model.named_children() if name.startswith("fc")]
    return sum(map(stored_numbers, parts)), sum(
        tensor.nbytes for part in parts for tensor in part.state_dict().values()
    )


def train_table(name: str, variants: dict, data, seeds: tuple[int, ...], epochs: int, batch: int) -> None:
    print(f"\n{name}: {epochs} epochs, batch {batch}, AdamW, one cycle, no augmentation, {len(seeds)} seed(s)\n")
    head("network", "highest rate", "dense part, numbers", "dense part, bytes", "safetensors, bytes", "ONNX, bytes", "accuracy, %", "seconds a seed")  # fmt: skip
    for title, (make, rate) in variants.items():
        found: dict[int, list[float]] = {}
        start = time.perf_counter()
        for seed in seeds:
            torch.manual_seed(seed)
            model = make(seed)
            train(model, Shuffled(data.x_train, data.y_train, batch), epochs, rate)
            forms = {32: model} | ({8: in_bits(model, 8)} if "permuted" in title else {})
            for bits, form in forms.items():
                found.setdefault(bits, []).append(accuracy(form, data.x_test, data.y_test))
        numbers, seconds = dense_part(model)[0], (time.perf_counter() - start) / len(seeds)
        for bits, form in forms.items():
            name = title if bits == 32 else f"the same, permuted layers in {bits} bits"
            cells = f"{numbers:,}", f"{dense_part(form)[1]:,}", f"{size_of(form):,}", f"{onnx_bytes(form, data.x_test):,}", spread(found[bits])  # fmt: skip
            row(name, rate, *cells, f"{seconds:.0f}")


def onnx_bytes(model: nn.Module, x: Tensor) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        slrprop.export_onnx(model, path, x[:4])
        return path.stat().st_size


def in_bits(model: nn.Module, bits: int) -> nn.Module:
    """The permuted layers' numbers rounded after training, biases to 8 bits; the seeds stay."""
    packed: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, PermutedLinear):
            form = quantised(module.factors().with_matrices({key: value.detach() for key, value in module.factors().matrices().items()}), bits)  # fmt: skip
            packed[name] = layer_from(Fit(form, bias_in_few_bits(module.bias.detach())))
    return swapped(model, packed)


def trained_part(args: argparse.Namespace) -> None:
    data = EXPERIMENTS["lenet5-mnist"].load_data(args.data)
    lenet = {
        "fc3, fc4 and fc5 permuted": (lambda seed: permute(LeNet5(), None, 100 * seed), 1e-2),
        "LeNet-5, dense": (lambda seed: LeNet5(), 3e-3),
        "fc3 and fc4 permuted": (lambda seed: permute(LeNet5(), ["fc3", "fc4"], 100 * seed), 1e-2),
        "dense 400-3-10": (lambda seed: Narrow(3), 1e-2),
    }
    train_table("LeNet-5, MNIST", lenet, data, SEEDS, 3, 128)
    longer = replace(EXPERIMENTS["lenet5-mnist"].recipe, batch=128, learning_rate=1e-2)
    torch.manual_seed(0)
    model = permute(LeNet5())
    fit(model, longer, data, "LeNet-5 permuted")
    for bits, form in {32: model, 8: in_bits(model, 8), 4: in_bits(model, 4)}.items():
        found = accuracy(form, data.x_test, data.y_test)
        print(
            f"{longer.epochs} epochs, shifted images, 1 seed, {bits} bits: {dense_part(form)[1]} bytes, {found:.2f} %"
        )
    data = EXPERIMENTS["room-mlp"].load_data(args.data)
    room = {
        "16-4000-4000-4000-4, fc2 and fc3 permuted": (
            lambda seed: permute(RoomMLP(), ["fc2", "fc3"], 100 * seed),
            3e-4,
        ),
        "dense 16-226-226-226-4": (lambda seed: RoomMLP(widths=(226, 226, 226)), 1e-3),
    }
    train_table("Room network", room, data, (0,), 4, 128)


def transfer_part(args: argparse.Namespace) -> None:
    data = EXPERIMENTS["lenet5-mnist"].load_data(args.data)

    def digits(x: Tensor, y: Tensor, first: int) -> tuple[Tensor, Tensor]:
        chosen = (y >= first) & (y < first + 5)
        return x[chosen], y[chosen] - first

    def dense_head() -> nn.Module:
        return nn.Sequential(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 5))

    heads = {
        "dense 400-120-84-5": (lambda seed: dense_head(), 3e-3),
        "permuted 400-120-84-5": (lambda seed: permute(dense_head(), None, 100 * seed), 1e-2),
        "dense 400-5": (lambda seed: nn.Sequential(nn.Linear(400, 5)), 1e-2),
        "dense 400-3-5": (lambda seed: nn.Sequential(nn.Linear(400, 3), nn.ReLU(), nn.Linear(3, 5)), 1e-2),
    }
    counts = (5, 20, 100, 500)
    found: dict[tuple[str, int], list[float]] = {}
    sizes = {
        title: sum(tensor.nbytes for tensor in make(0).state_dict().values()) for title, (make, _) in heads.items()
    }
    for seed in SEEDS:
        torch.manual_seed(seed)
        base = train(LeNet5(5), Shuffled(*digits(data.x_train, data.y_train, 0), 128), 3, 3e-3)
        with torch.inference_mode():
            (x, y), (x_test, y_test) = digits(data.x_train, data.y_train, 5), digits(data.x_test, data.y_test, 5)
            x, x_test = (torch.cat([base.features(part) for part in images.split(1000)]) for images in (x, x_test))
        x, x_test = x.clone(), x_test.clone()  # no inference tensors: they are trained on
        for count in counts:
            chosen = torch.cat([(y == digit).nonzero()[:, 0][torch.randperm(int((y == digit).sum()))[:count]] for digit in range(5)])  # fmt: skip
            batches = Shuffled(x[chosen], y[chosen], 25)
            for title, (make, rate) in heads.items():
                torch.manual_seed(seed)
                model = train(make(seed), batches, 600 // len(batches), rate)
                found.setdefault((title, count), []).append(accuracy(model, x_test, y_test))
    print("\nHeads on frozen convolutions, digits 5 to 9: 600 steps of 25 samples, AdamW, one cycle up to 0.003 (dense 400-120-84-5) or 0.01, 3 seeds; accuracy, %\n")  # fmt: skip
    head("head", "bytes", *(f"{count} samples a class" for count in counts))
    for title in heads:
        row(title, f"{sizes[title]:,}", *(spread(found[title, count]) for count in counts))


def fitted_part(args: argparse.Namespace) -> None:
    for name, layers, seeds in (("lenet5-mnist", ["fc3", "fc4"], range(10)), ("room-mlp", ["fc2", "fc3"], range(3))):
        experiment = EXPERIMENTS[name]
        data = experiment.load_data(args.data)
        samples = data.x_train[: experiment.calibration]
        rows: dict[str, list[tuple[float, int, float]]] = {}
        for seed in seeds:
            model = trained(experiment, seed, data, args.run_dir)
            ways = {"fitted": {"refine": 0}} | ({"refined in the data's metric": {"refine": 4}} if name == "lenet5-mnist" else {})  # fmt: skip
            whole = sum(4 * model.get_submodule(layer).weight.numel() for layer in layers)
            rows.setdefault("dense", []).append((accuracy(model, data.x_test, data.y_test), whole, 0.0))
            for title, settings in ways.items():
                start = time.perf_counter()
                made = slrprop.plan(model, samples, method="permuted", layers=layers, **settings)
                seconds = time.perf_counter() - start
                small = slrprop.apply(model, made)
                size = sum(layer.factors.bytes for layer in made.layers)
                rows.setdefault(title, []).append((accuracy(small, data.x_test, data.y_test), size, seconds))
            for bits in (8, 4):
                small, size = rounded(model, layers, bits)
                found = accuracy(small, data.x_test, data.y_test), size, 0.0
                rows.setdefault(f"dense, rounded to {bits} bits", []).append(found)
        print(f"\n{name}: {' and '.join(layers)}, {len(seeds)} seeds\n")
        head("form", "bytes of the two weights", "share", "accuracy, %", "seconds to fit")
        for title, results in rows.items():
            accuracies, sizes, seconds = (list(column) for column in zip(*results, strict=True))
            row(title, f"{sizes[0]:,}", f"{sizes[0] / whole:.3f}", spread(accuracies), f"{statistics.mean(seconds):.1f}")  # fmt: skip


def rounded(model: nn.Module, layers: list[str], bits: int) -> tuple[nn.Module, int]:
    """The weights rounded to the nearest of 2^bits - 1 levels, one float16 scale an output."""
    fresh, size, top = type(model)(), 0, 2 ** (bits - 1) - 1
    fresh.load_state_dict(model.state_dict())
    for layer in layers:
        weight = fresh.get_submodule(layer).weight.data
        scale = (weight.abs().amax(1, keepdim=True) / top).half().float()
        weight.copy_((weight / scale).round().clamp(-top, top) * scale)
        size += weight.numel() * bits // 8 + 2 * len(weight)
    return fresh.eval(), size


LOAD = """
import sys, time
from pathlib import Path
from slrprop.export import session
import numpy as np
def highest():  # kB; getrusage's figure would be the parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before, start = highest(), time.perf_counter()
loaded = session(sys.argv[1], 1)
seconds, peak = time.perf_counter() - start, highest() - before
x = np.ones((1, int(sys.argv[2])), np.float32)
times = []
for _ in range(30):
    start = time.perf_counter()
    loaded.run(None, {loaded.get_inputs()[0].name: x})
    times.append(time.perf_counter() - start)
print(f"{seconds:.1f} | {peak / 1024:.0f} | {1e3 * sorted(times)[15]:.2f}")
"""


def files_part(args: argparse.Namespace) -> None:
    print("\nONNX files of one 4000 x 4000 layer, ONNX Runtime, 1 thread\n")
    head("form", "bytes", "seconds to load", "more memory at the peak of loading, MB", "one sample, ms")
    seeded = PermutedLinear(4000, 4000, seed=0)
    for part in (seeded.scale, seeded.bias):
        nn.init.normal_(part)  # a trained layer's are no constants
    packed = layer_from(Fit(seeded.factors().permuted(torch.arange(4000))).over(seeded.bias))
    for name, layer in (("dense", nn.Linear(4000, 4000)), ("packed", packed), ("seed", seeded)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layer.onnx"
            slrprop.export_onnx(layer, path, torch.randn(4, 4000))
            done = subprocess.run([sys.executable, "-c", LOAD, str(path), "4000"], capture_output=True, text=True, check=True)  # fmt: skip
            row(name, f"{path.stat().st_size:,}", done.stdout.strip())


class Architecture(NamedTuple):
    """Numbers of everything but the dense layers, and the widths of the dense layers (inputs, outputs, outputs, ...)."""

    other: int
    dense: tuple[int, ...]

    @property
    def layers(self) -> list[tuple[int, int]]:
        return list(pairwise(self.dense))

    @property
    def total(self) -> int:
        return self.other + sum(m * n + n for m, n in self.layers)


def conv(inputs: int, outputs: int, side: int, groups: int = 1, bias: bool = True, norm: bool = False) -> int:
    return inputs // groups * outputs * side * side + outputs * bias + 2 * outputs * norm


def chain(widths: tuple[int, ...], side: int, **options: bool) -> int:
    return sum(conv(a, b, side, **options) for a, b in pairwise(widths))


VGG16 = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def resnet50() -> int:
    """He et al., CVPR 2016: bottlenecks 1x1, 3x3, 1x1 with batch norm, a projection at the head of each stage."""
    total, inputs = conv(3, 64, 7, bias=False, norm=True), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes = [(inputs, width, 1), (width, width, 3), (width, 4 * width, 1)]
            shapes += [(inputs, 4 * width, 1)] if block == 0 else []
            total += sum(conv(*shape, bias=False, norm=True) for shape in shapes)
            inputs = 4 * width
    return total


def mobilenet_v2() -> int:
    """Sandler et al., CVPR 2018, table 2: expansion, channels, repeats."""
    total, inputs = conv(3, 32, 3, bias=False, norm=True), 32
    for expansion, channels, repeats in ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)):  # fmt: skip
        for _ in range(repeats):
            wide = expansion * inputs
            total += conv(inputs, wide, 1, bias=False, norm=True) if expansion > 1 else 0
            total += conv(wide, wide, 3, groups=wide, bias=False, norm=True)
            total += conv(wide, channels, 1, bias=False, norm=True)
            inputs = channels
    return total + conv(320, 1280, 1, bias=False, norm=True)


ARCHITECTURES = {
    "LeNet-5": Architecture(chain((1, 6, 16), 5), (400, 120, 84, 10)),
    "AlexNet (two groups)": Architecture(
        conv(3, 96, 11) + conv(96, 256, 5, 2) + conv(256, 384, 3) + conv(384, 384, 3, 2) + conv(384, 256, 3, 2),
        (9216, 4096, 4096, 1000),
    ),
    "VGG16, ImageNet": Architecture(chain(VGG16, 3), (25088, 4096, 4096, 1000)),
    "VGG16, CIFAR-10": Architecture(chain(VGG16, 3, norm=True), (512, 4096, 4096, 10)),
    "ResNet-50": Architecture(resnet50(), (2048, 1000)),
    "MobileNetV2": Architecture(mobilenet_v2(), (1280, 1000)),
}


def stored_bytes(architecture: Architecture, permuted: int, packed: bool, offset: bool) -> int:
    """Bytes with the first ``permuted`` dense layers permuted; 4 a number, 8 a seed."""
    total = 4 * architecture.other
    for index, (m, n) in enumerate(architecture.layers):
        if index < permuted:
            total += 4 * (m + n + n * offset + n) + (packed_bytes(m, n) if packed else 8)
        else:
            total += 4 * (m * n + n)
    return total


def counted_part(args: argparse.Namespace) -> None:
    print("\nParameters of the whole network before / after, as times smaller; 4 bytes a number, 8 a seed\n")
    head("network", "parameters", "dense layers' share", "seeds, all dense layers", "seeds, all but the classifier", "packed permutations, all dense layers")  # fmt: skip
    ways = {"all dense layers": [], "all but the classifier": [], "packed permutations": []}
    for name, network in ARCHITECTURES.items():
        count, whole = len(network.layers), 4 * network.total
        hows = (count, False, False), (count - 1, False, False), (count, True, True)
        cells = [whole / stored_bytes(network, *how) for how in hows]
        for found, cell in zip(ways.values(), cells, strict=True):
            found.append(cell)
        row(name, f"{network.total:,}", f"{1 - network.other / network.total:.1%}", *(f"{cell:.2f}x" for cell in cells))
    print()
    for title, found in ways.items():
        print(f"{title}: {min(found):.2f}x to {max(found):.2f}x, median {statistics.median(found):.2f}x")


def main() -> None:
    parts = {
        "files": files_part,
        "fitted": fitted_part,
        "trained": trained_part,
        "transfer": transfer_part,
        "counted": counted_part,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/paper"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for part in args.parts:
        parts[part](args)


if __name__ == "__main__":
    main()
