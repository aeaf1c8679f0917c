"""Peak memory of compressing networks, each in a process of its own, above what the imports take.

    pip install 'slrprop[encoder]'
    python -m benchmarks.memory [--cases convolutions lenet300 lenet300-size chain vit minilm large ...] [--doors torch onnx]

*convolutions*: four of them before a dense head, 3 MB, 311 images of 64 kB. *lenet300*: 784-300-100-10, 1 MB, 1000 samples; *-size*: with
``size_only``. *chain*: four dense layers, 256 wide, 4000 samples. *vit*: that of ``benchmarks.encoder``, 256 images. *minilm*: the published
encoder, texts of 64 tokens, 256 of them as a module and 512 as a file. *large*: a file of five dense layers of 105 MB, one of which is chosen.
Half of the samples search and half check. The values of weights and samples do not matter for memory: they are random, but for the encoder's.

*Limit*: 600 MB, or four times the model and 300 MB where that is more. Linux only: the peak is the kernel's.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # noqa: F401  (loaded at its first use, which counts as the imports')
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import slrprop
from benchmarks.encoder import Sorter, ViT, bert
from benchmarks.quantisation import header
from slrprop.checks import need_extra
from slrprop.storage import size_of

Made = tuple[nn.Module, Any, dict[str, Any]]  # a network, samples, what is asked of ``compress``
WIDE = 5120


def convolutions(door: str) -> Made:
    """Convolutions on large maps, and a dense head."""
    sizes, parts = (1, 16, 16, 32, 32), list[nn.Module]()
    for (m, n), stride in zip(itertools.pairwise(sizes), (1, 1, 4, 2), strict=True):
        parts += [nn.Conv2d(m, n, 3, stride, 1), nn.ReLU()]
    head = [nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 900), nn.ReLU(), nn.Linear(900, 10)]
    return nn.Sequential(*parts, nn.MaxPool2d(4), nn.Flatten(), *head), torch.rand(311, 1, 128, 128), {"max_bytes": "50%"}  # fmt: skip


def dense(sizes: list[int], samples: int, **asked: Any) -> Made:
    """Dense layers with ReLU between them."""
    layers = [part for m, n in itertools.pairwise(sizes) for part in (nn.Linear(m, n), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.rand(samples, sizes[0]), asked


def vit(door: str) -> Made:
    """The vision transformer."""
    return ViT(), torch.rand(256, 1, 28, 28), {"max_bytes": "50%"}


def minilm(door: str) -> Made:
    """The published encoder with a head for four classes."""
    count = 256 if door == "torch" else 512
    ids = torch.randint(1000, 30000, (count, 64))
    return Sorter(bert()[0]), {"ids": ids, "mask": torch.ones_like(ids)}, {"max_bytes": "60%"}


CASES: dict[str, Callable[[str], Made]] = {
    "convolutions": convolutions,
    "lenet300": lambda door: dense([784, 300, 100, 10], 1000, max_bytes="10%"),
    "lenet300-size": lambda door: dense([784, 300, 100, 10], 1000, max_bytes="10%", size_only=True),
    "chain": lambda door: dense([784, *[256] * 4, 10], 4000, max_bytes="20%"),
    "vit": vit,
    "minilm": minilm,
}


def large(path: Path) -> None:
    """A file of five dense layers."""
    random = np.random.default_rng(0)
    nodes, tensors = [], []
    for index in range(5):
        weight = random.standard_normal((WIDE, WIDE), np.float32) / (20 * WIDE)
        weight += random.standard_normal((WIDE, 64), np.float32) @ random.standard_normal((64, WIDE), np.float32) / WIDE
        tensors.append(numpy_helper.from_array(weight, f"w{index}"))
        source, target = ("x" if index == 0 else f"a{index - 1}"), ("y" if index == 4 else f"z{index}")
        nodes.append(helper.make_node("MatMul", [source, f"w{index}"], [target], f"dense{index}"))
        if index < 4:
            nodes.append(helper.make_node("Relu", [target], [f"a{index}"]))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDE]) for name in "xy"]
    graph = helper.make_graph(nodes, "large", value[:1], value[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def prepare(case: str, folder: Path) -> None:
    """Write a case's file and samples."""
    if case == "large":
        large(folder / "model.onnx")
        samples: Any = torch.randn(64, WIDE)
    else:
        model, samples, _ = CASES[case]("onnx")
        few = tuple(x[:2] for x in samples.values()) if isinstance(samples, dict) else (samples[:2],)
        slrprop.export_onnx(model.eval(), folder / "model.onnx", few)
    arrays = samples if isinstance(samples, dict) else {"x": samples}
    np.savez(folder / "data.npz", **{name: x.numpy() for name, x in arrays.items()})


def status(key: str) -> int:
    """Bytes that the kernel tells of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def measure(case: str, door: str, folder: Path) -> None:
    """Compress in this process, and print what that took."""
    torch.manual_seed(0)
    if (case, door) == ("minilm", "torch"):
        _ = need_extra("transformers", "encoder").BertModel  # imported when it is asked for
    compress = slrprop.compress  # loads what it needs
    before, start = status("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    model: Any = folder / "model.onnx"
    if door == "torch":
        model, samples, asked = CASES[case](door)
        size = size_of(model.eval())
    else:
        asked = {"max_bytes": "85%", "layers": "dense1"} if case == "large" else CASES[case]("torch")[2]
        samples, size = folder / "data.npz", model.stat().st_size
    found = compress(model, samples, **asked)
    print(json.dumps({"size": size, "peak": status("VmHWM") - before, "small": found.bytes[1], "seconds": time.perf_counter() - start}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[*CASES, "large"], choices=[*CASES, "large"])
    parser.add_argument("--doors", nargs="+", default=["torch", "onnx"], choices=["torch", "onnx"])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, where, folder = args.child
        prepare(what, Path(folder)) if where == "prepare" else measure(what, where, Path(folder))
        return
    header("network", "door", "MB", "peak above the imports, MB", "limit, MB", "result, MB", "minutes")
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:

            def child(what: str, case: str = case, folder: str = folder) -> str:
                command = [sys.executable, "-m", "benchmarks.memory", "--child", case, what, folder]
                return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout

            doors = [door for door in args.doors if case != "large" or door == "onnx"]
            if "onnx" in doors:
                child("prepare")
            for door in doors:
                told = json.loads(child(door).splitlines()[-1])
                limit = max(600e6, 4 * told["size"] + 300e6)
                mega = [f"{value / 1e6:.{digits}f}" for value, digits in ((told["size"], 1), (told["peak"], 0), (limit, 0), (told["small"], 1))]  # fmt: skip
                print(f"| {case} | {door} | {' | '.join(mega)} | {told['seconds'] / 60:.1f} |", flush=True)


if __name__ == "__main__":
    main()
