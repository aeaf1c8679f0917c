"""Peak memory of compressing a large ONNX file of which one layer is chosen.

    python -m benchmarks.memory [--width 5120] [--layers 5]

Makes a chain of dense layers (5 x 105 MB by default) and data, then runs ``slrprop compress --layers`` for one of them
in a process of its own and reports that process's peak resident memory beside the file's size.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def make(path: Path, width: int, layers: int) -> None:
    random = np.random.default_rng(0)
    nodes, tensors = [], []
    for index in range(layers):
        spectrum = 0.9 ** np.arange(64)
        left, right = random.standard_normal((width, 64)), random.standard_normal((64, width))
        weight = (left * spectrum) @ right / width + random.standard_normal((width, width)) / (20 * width)
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"w{index}"))
        source, target = ("x" if index == 0 else f"a{index - 1}"), ("y" if index == layers - 1 else f"z{index}")
        nodes.append(helper.make_node("MatMul", [source, f"w{index}"], [target], f"dense{index}"))
        if index < layers - 1:
            nodes.append(helper.make_node("Relu", [target], [f"a{index}"]))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in "xy"]
    graph = helper.make_graph(nodes, "chain", value[:1], value[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--layers", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, data, small = (Path(folder) / name for name in ("model.onnx", "data.npz", "small.onnx"))
        subprocess.run([sys.executable, "-c", f"from benchmarks.memory import make; from pathlib import Path; make(Path({str(model)!r}), {args.width}, {args.layers})"], check=True)  # fmt: skip
        np.savez(data, x=np.random.default_rng(1).standard_normal((64, args.width)).astype(np.float32))
        run = "import resource, sys; from slrprop.cli import app; app(sys.argv[1:], standalone_mode=False); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        command = [
            "compress",
            str(model),
            "--calibration",
            str(data),
            "--layers",
            "dense1",
            "--max-bytes",
            "85%",
            "-o",
            str(small),
        ]
        done = subprocess.run([sys.executable, "-c", run, *command], capture_output=True, text=True, check=True)
        peak, size = 1024 * int(done.stdout.split()[-1]), model.stat().st_size
        print(
            f"file {size / 1e6:.0f} MB, result {small.stat().st_size / 1e6:.0f} MB, peak memory {peak / 1e6:.0f} MB: {peak / size:.2f}x the file"
        )


if __name__ == "__main__":
    main()
