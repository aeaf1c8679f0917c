"""What OpenVINO's CPU plugin computes of layers in few bits: its outputs against ONNX Runtime's, or a crash.

    pip install openvino; python -m benchmarks.openvino [--layer 64x64x8]

First the factors of low rank by three graphs: Cast and Mul, DequantizeLinear, and what slrprop writes. Then every form as slrprop
writes it. Each file is run in a process of its own. Cells: the largest difference, of the largest output.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from benchmarks.quantisation import dequantizing, forms, header, session, sizes, written
from slrprop.fit.quantize import quantised
from slrprop.forms import Form, Quantized

RUN = """
import sys, numpy, openvino
model = openvino.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
numpy.save(sys.argv[3], next(iter(model({0: numpy.load(sys.argv[2])}).values())))
"""


def multiplying(path: Path, form: Quantized) -> None:
    """One layer whose real numbers are made by Cast and Mul."""
    dequantizing(path, form)
    model = onnx.load(path)
    graph, scales = model.graph, {tensor.name: tensor for tensor in model.graph.initializer}
    for index, node in reversed(list(enumerate(graph.node))):
        if node.op_type == "DequantizeLinear":
            name, scale = node.input
            wide = numpy_helper.to_array(scales[scale])
            wide = wide[:, None] if node.attribute[0].i == 0 else wide
            scales[scale].CopyFrom(numpy_helper.from_array(wide, scale))
            made = [helper.make_node("Cast", [name], [f"{name}_cast"], to=onnx.TensorProto.FLOAT), helper.make_node("Mul", [f"{name}_cast", scale], node.output)]  # fmt: skip
            nodes = [*graph.node[:index], *made, *graph.node[index + 1 :]]
            del graph.node[:]
            graph.node.extend(nodes)
    onnx.save(model, path)


def compared(path: Path, m: int) -> str:
    """OpenVINO's outputs of a file against ONNX Runtime's."""
    x, y = path.with_suffix(".x.npy"), path.with_suffix(".y.npy")
    np.save(x, np.random.default_rng(0).standard_normal((5, m)).astype(np.float32))
    done = subprocess.run([sys.executable, "-c", RUN, str(path), str(x), str(y)], capture_output=True, text=True)
    if done.returncode:
        return f"crash ({done.returncode})" if done.returncode < 0 else done.stderr.strip().splitlines()[-1]
    want = session(path).run(None, {"x": np.load(x)})[0]
    return f"{np.abs(np.load(y) - want).max() / np.abs(want).max():.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", default="64x64x8", metavar="MxMxK")
    m, _, k = sizes(parser.parse_args().layer)
    torch.manual_seed(0)
    every = forms(m, k)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        header("graph", "8 bits", "4 bits")
        for name, write in (("Cast and Mul", multiplying), ("DequantizeLinear", dequantizing), ("Cast and Div, scales joined", written)):  # fmt: skip
            cells = []
            for bits in (8, 4):
                write(path, quantised(every["low rank"], bits))
                cells.append(compared(path, m))
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        print()
        header("form", *(f"opset {opset}, {bits} bits" for opset in (17, 21) for bits in (32, 8, 4)))
        for name, form in every.items():
            cells = []
            for opset in (17, 21):
                for bits in (32, 8, 4):
                    stored: Form = form if bits == 32 else quantised(form, bits)
                    written(path, stored, opset)
                    cells.append(compared(path, m))
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
