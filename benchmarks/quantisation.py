"""Layers in 8 and 4 bits in ONNX files, and sparse low rank as blocks or as merged products: latency, error, bytes, load.

    python -m benchmarks.quantisation [--layers 400x120x12 ...] [--sparse 400x120x12 ...] [--around 300x300x16 ...] [--batches 1 32] [--turns 30]

1 thread. Random factors whose components fall like 1/sqrt(i): values do not matter for speed, and rounding sees components of
different size. First table: the float32 factors, the nodes that slrprop writes (Cast and Div; 4 bits also by arithmetic, for
operator sets before 21), and DequantizeLinear in their place, with ONNX Runtime's own choice of arithmetic for what it makes of
it and with float32 asked for (session.qdq_matmulnbits_accuracy_level 1); "joined": the first factor has the products of both
scales of each component. Second table: one product per block against padded, merged products, with the neurons of the
blocks anywhere and in order. Then: what each limit of the zeros costs against the faster way of every layer. Before all: what
a file takes around the numbers of each form.

A turn runs every variant in a new random order: once unmeasured, then 5 times. Medians and quartiles of all runs.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from slrprop.fit.quantize import bias_in_few_bits, quantised
from slrprop.forms import (
    Dense,
    Fit,
    Form,
    LowRank,
    LowRankPlusSparse,
    Narrowed,
    Quantized,
    Shared,
    Sparse,
    SparseLowRank,
)
from slrprop.linalg import SVD
from slrprop.methods.nested import NestedSettings
from slrprop.network.onnx import rewrite as onnx_rewrite
from slrprop.network.onnx.network import OnnxNetwork

LAYERS = ["400x120x12", "120x84x8", "784x300x24", "512x4096x64", "4096x4096x64", "4096x4096x256"]
SPARSE = [
    "120x84x8", "400x120x12", "300x100x16", "784x300x8", "784x300x24", "512x512x32", "784x300x64", "1024x1024x24", "1024x1024x64",
    "784x300x128", "1024x1024x256", "512x4096x32", "512x4096x64", "2048x2048x64", "2048x2048x256", "4096x4096x16", "4096x4096x64", "4096x4096x256",
]  # fmt: skip
AROUND = ["64x64x8", "300x300x16"]
NONE = 10**12  # more zeros than any layer has
LIMITS = [0, 5_000, 10_000, 20_000, 40_000, 80_000, 160_000, 320_000, NONE]
SHARES = [0, 6, 12, 25, 50, 100, 200, NONE]
DENSE = 250_000  # numbers up to which the dense weight is measured too
CALLS = 5  # measured runs of one variant in one turn
LEVEL = "session.qdq_matmulnbits_accuracy_level"
Variant = tuple[Path, str | None]  # a file, and the accuracy level to ask the runtime for


def sizes(text: str) -> tuple[int, int, int]:
    """Inputs, outputs and rank out of ``784x300x24``."""
    m, n, k = (int(part) for part in text.split("x"))
    return m, n, k


def factors(m: int, n: int, k: int) -> LowRank:
    """Random factors with components of different size; outputs of about 1 for inputs of about 1."""
    strength = torch.arange(1, k + 1).rsqrt()
    return LowRank(torch.randn(m, k) * strength / strength.norm() / m**0.5, torch.randn(k, n))


def session(path: Path, level: str | None = None, made: Path | None = None) -> onnxruntime.InferenceSession:
    """One thread; with ``made`` the graph that the runtime makes of the file is written there."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if level is not None:
        options.add_session_config_entry(LEVEL, level)
    if made is not None:
        options.optimized_model_filepath = str(made)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def nodes(variant: Variant) -> str:
    """What runs once the file is loaded, like ``2 MatMul``."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.onnx"
        session(*variant, made)
        count = Counter(node.op_type for node in onnx.load(made).graph.node)
    return ", ".join(f"{times} {op}" for op, times in sorted(count.items()))


def model(
    path: Path,
    m: int,
    n: int,
    opset: int,
    made: list[onnx.NodeProto],
    tensors: list[TensorProto],
) -> None:
    """A file that makes ``y`` (batch, n) of ``x`` (batch, m)."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", side]) for name, side in (("x", m), ("y", n))
    ]
    graph = helper.make_graph(made, "layer", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)


def written(path: Path, form: Form, opset: int = 21, integers: bool = False) -> None:
    """One layer in a form, by the nodes that slrprop writes, with or without integer products."""
    (m, n), dense = form.shape, path.with_suffix(".dense.onnx")
    weight = numpy_helper.from_array(np.zeros((m, n), np.float32), "weight")
    model(dense, m, n, opset, [helper.make_node("MatMul", ["x", "weight"], ["y"], "dense")], [weight])
    network = OnnxNetwork(dense, None)
    onnx_rewrite.rewritten(network.file, {"dense": Fit(form)}, integers).save(path, lambda _: None)
    dense.unlink()


def dequantizing(path: Path, form: Quantized, joined: bool = False) -> None:
    """One layer of products with DequantizeLinear before their right inputs.

    Args:
        joined: of two factors, give the first the products of both scales of each component, the second one scale of 1.
    """
    made, tensors, x = [], [], "x"
    axes, matrices = form.codes.scale_axes(), form.codes.matrices()
    scales = {name: scale.float() for name, scale in form.scales.items()}
    if joined:
        scales = {"left": scales["left"] * scales["right"], "right": torch.tensor(1.0)}
    for index, (name, codes) in enumerate(matrices.items()):
        whole = codes.numpy().astype(ml_dtypes.int4 if form.bits == 4 else np.int8)
        tensors.append(numpy_helper.from_array(whole, name))
        tensors.append(numpy_helper.from_array(scales[name].numpy(), f"{name}_scale"))
        axis = {"axis": 1 - axes[name]} if scales[name].ndim else {}
        made.append(helper.make_node("DequantizeLinear", [name, f"{name}_scale"], [f"{name}_real"], **axis))
        y = "y" if index == len(matrices) - 1 else f"hidden_{index}"
        made.append(helper.make_node("MatMul", [x, f"{name}_real"], [y]))
        x = y
    model(path, *form.shape, 21, made, tensors)


def interleaved(calls: Mapping[str, Callable[[], object]], turns: int, each: int = CALLS) -> dict[str, list[float]]:
    """Seconds of every measured call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    random, names = np.random.default_rng(0), list(calls)
    for _ in range(turns):
        for place in random.permutation(len(names)):
            call, taken = calls[names[place]], times[names[place]]
            call()
            for _ in range(each):
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
    return times


def runs(variants: Mapping[str, Variant], x: np.ndarray, turns: int) -> dict[str, list[float]]:
    """Seconds of running every variant on ``x``."""
    runtimes = {name: session(*variant) for name, variant in variants.items()}
    return interleaved({name: partial(runtime.run, None, {"x": x}) for name, runtime in runtimes.items()}, turns)


def spread(times: list[float]) -> str:
    """Median and quartiles in microseconds."""
    low, middle, high = (1e6 * value for value in statistics.quantiles(times, n=4))
    digits = 0 if middle >= 100 else 1
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def bits_of(form: Form, folder: Path, batches: list[int], turns: int) -> list[str]:
    """Rows of the first table for one layer."""
    m, n = form.shape
    base = "dense" if isinstance(form, Dense) else f"k = {next(iter(form.matrices().values())).shape[1]}"
    variants: dict[str, Variant] = {"float32": (folder / "float.onnx", None)}
    written(variants["float32"][0], form)
    stored: dict[str, Form] = {"float32": form}
    for bits in (8, 4):
        few = quantised(form, bits)
        ways: dict[str, Variant] = {
            f"{bits} bits, Cast and Div": (folder / f"cast{bits}.onnx", None),
            f"{bits} bits, DequantizeLinear": (folder / f"dequantize{bits}.onnx", None),
        }
        written(folder / f"cast{bits}.onnx", few)
        dequantizing(folder / f"dequantize{bits}.onnx", few)
        last = folder / f"dequantize{bits}.onnx"
        if isinstance(form, LowRank):
            last = folder / f"joined{bits}.onnx"
            dequantizing(last, few, joined=True)
            ways[f"{bits} bits, DequantizeLinear, joined"] = (last, None)
        ways[f"{bits} bits, DequantizeLinear{', joined' * isinstance(form, LowRank)}, level 1"] = (last, "1")
        if bits == 4:
            ways["4 bits, arithmetic (opset 18)"] = (folder / "halves.onnx", None)
            written(folder / "halves.onnx", few, 18)
        variants |= ways
        stored |= dict.fromkeys(ways, few)
    x = torch.randn(256, m, dtype=torch.float64).float()
    errors: dict[str, list[float]] = {}
    for name, variant in variants.items():
        y = torch.from_numpy(session(*variant).run(None, {"x": x.numpy()})[0]).double()
        few = stored[name]
        forms = form, few.plain() if isinstance(few, Quantized) else few
        wants = [x.double() @ whole.with_matrices({key: value.double() for key, value in whole.matrices().items()}).dense() for whole in forms]  # fmt: skip
        errors[name] = [float((y - want).norm() / want.norm()) for want in wants]
    times = [runs(variants, x[:batch].numpy(), turns) for batch in batches]
    loads = interleaved({name: partial(session, *variant) for name, variant in variants.items()}, 3, 2)
    rows = []
    for name, variant in variants.items():
        measured = " | ".join(spread(of[name]) for of in times)
        whole, own = errors[name]
        size, load = variant[0].stat().st_size, 1e3 * statistics.median(loads[name])
        rows.append(f"| {m}x{n} {base} | {name} | {nodes(variant)} | {measured} | {whole:.1e} | {own:.1e} | {size:,} | {load:.1f} |")  # fmt: skip
    return rows


def sparse_forms(m: int, n: int, k: int) -> dict[str, SparseLowRank]:
    """Nested (three-wide) and SLR at rates 0.5, the neurons of their blocks anywhere."""
    levels = NestedSettings(rank=k, shape="three-wide").sizes(m, n)
    row_levels, column_levels = (
        torch.stack([torch.arange(side) < level[axis] for level in levels]).sum(0).byte()[torch.randperm(side)]
        for axis, side in enumerate((m, n))
    )
    left = tuple(torch.randn(rows, rank) / m**0.5 for rows, _, rank in levels)
    right = tuple(torch.randn(rank, columns) for _, columns, rank in levels)
    low = factors(m, n, k)
    svd = SVD(low.left, torch.ones(k), low.right)
    return {
        "three-wide": SparseLowRank(left, right, row_levels, column_levels),
        "SLR": SparseLowRank.shorten(svd, k // 2, torch.randperm(m) < m // 2, torch.randperm(n) < n // 2),
    }


def blocks_and_merged(form: SparseLowRank, folder: Path, batches: list[int], turns: int) -> list[tuple[float, float]]:
    """Median seconds of blocks and of merged products for every batch size."""
    before, variants = onnx_rewrite.MERGED, {}
    for name, limit in (("blocks", -(10**12)), ("merged", 10**12)):
        onnx_rewrite.MERGED, variants[name] = limit, (folder / f"{name}.onnx", None)
        try:
            written(folder / f"{name}.onnx", form)
        finally:
            onnx_rewrite.MERGED = before
    found = []
    for batch in batches:
        times = runs(variants, torch.randn(batch, form.shape[0]).numpy(), turns)
        found.append((statistics.median(times["blocks"]), statistics.median(times["merged"])))
    return found


class Timed(NamedTuple):
    """A sparse layer's zeros, the numbers that its blocks gather for one sample, and median seconds both ways."""

    zeros: int
    gathered: int
    blocks: float
    merged: float


def limits(values: list[int], columns: list[list[Timed]], allowed: Callable[[int, Timed], int]) -> list[str]:
    """For each limit: the mean (geometric) of the time above that of every layer's faster way.

    Args:
        allowed: the zeros up to which a layer is merged under a limit.
    """
    rows = []
    for value in values:
        cells = []
        for layers in columns:
            taken = [t.merged if t.zeros <= allowed(value, t) else t.blocks for t in layers]
            excess = [np.log(seconds / min(t.blocks, t.merged)) for seconds, t in zip(taken, layers, strict=True)]
            cells.append(f"{100 * np.expm1(np.mean(excess)):.1f} %")
        rows.append(f"| {'none' if value == NONE else f'{value:,}'} | {' | '.join(cells)} |")
    return rows


def forms(m: int, k: int) -> dict[str, Form]:
    """An m x m layer in every form: a tenth of single weights, half of the neurons."""
    low, few = factors(m, m, k), Sparse.of(torch.randn(m, m), torch.rand(m, m) < 0.1)
    nested, slr = sparse_forms(m, m, k).values()
    rows, columns, scale = torch.rand(m) < 0.5, torch.rand(m) < 0.5, torch.randn(m)
    return {
        "dense": Dense(torch.randn(m, m)),
        "low rank": low,
        "nested (three-wide)": nested,
        "SLR": slr,
        "sparse": few,
        "low rank + sparse": LowRankPlusSparse(low, few),
        "narrowed": Narrowed(torch.randn(int(rows.sum()), int(columns.sum())), rows, columns),
        "permuted, packed": Shared.of(torch.randn(m), scale, scale, torch.rand(m, m).argsort(1)),
        "permuted, a seed": Shared(torch.randn(m), scale, scale, seed=1),
    }


def around(layers: list[Form], bits: int, opset: int, folder: Path) -> int:
    """Bytes of a file around the numbers of its layers (m x m, one after the other), their scales, places and biases."""
    m, names = layers[0].shape[0], [f"/layers.{index}/Gemm" for index in range(len(layers))]
    inside = ["x", *(f"h{index}" for index in range(1, len(layers))), "y"]
    made = [
        helper.make_node("Gemm", [x, f"w{x}", f"b{x}"], [y], name)
        for x, y, name in zip(inside, inside[1:], names, strict=False)
    ]
    tensors = [
        numpy_helper.from_array(np.random.rand(*shape).astype(np.float32), f"{what}{x}")
        for x in inside[:-1]
        for what, shape in (("w", (m, m)), ("b", (m,)))
    ]
    model(folder / "dense.onnx", m, m, opset, made, tensors)
    network = OnnxNetwork(folder / "dense.onnx", None)
    few = (Fit(quantised(form, bits), bias_in_few_bits(torch.randn(m))) for form in layers)
    stored = dict(zip(names, map(Fit, layers) if bits == 32 else few, strict=True))
    onnx_rewrite.rewritten(network.file, stored).save(folder / "few.onnx", lambda _: None)
    return (folder / "few.onnx").stat().st_size - sum(network.stored(name, fit) for name, fit in stored.items())


def bytes_around(m: int, k: int) -> list[str]:
    """Rows of the last table: what one layer takes, the file's own some 100 bytes included, and each further one."""
    drawn, rows = [forms(m, k) for _ in range(3)], []
    with tempfile.TemporaryDirectory() as folder:
        for name in drawn[0]:
            layers, cells = [one[name] for one in drawn], []
            for opset, bits in itertools.product((17, 21), (32, 8, 4)):
                one, three = (around(layers[:count], bits, opset, Path(folder)) for count in (1, 3))
                cells.append(f"{one:,} / {(three - one) // 2:,}")
            rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def header(*names: str) -> None:
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="*", default=LAYERS, metavar="MxNxK")
    parser.add_argument("--sparse", nargs="*", default=SPARSE, metavar="MxNxK")
    parser.add_argument("--around", nargs="*", default=AROUND, metavar="MxMxK")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--turns", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for m, _, k in map(sizes, args.around):
        header(f"{m} x {m}, k = {k}", *(f"opset {opset}, {bits} bits" for opset in (17, 21) for bits in (32, 8, 4)))
        print("\n".join(bytes_around(m, k)), end="\n\n", flush=True)
    if args.layers:
        header("layer", "stored as", "runs as", *(f"batch {batch}, µs" for batch in args.batches), "error", "own error", "bytes", "load, ms")  # fmt: skip
    for m, n, k in map(sizes, args.layers):
        for form in (factors(m, n, k), *([Dense(factors(m, n, k).dense())] if m * n <= DENSE else [])):
            with tempfile.TemporaryDirectory() as folder:
                print("\n".join(bits_of(form, Path(folder), args.batches, args.turns)), flush=True)
    if not args.sparse:
        return
    print()
    columns = [f"{order}, batch {batch}" for order in ("anywhere", "in order") for batch in args.batches]
    header("layer", "form", "zeros", "gathered", *columns)
    measured: dict[str, list[Timed]] = {column: [] for column in columns}
    rows = []
    for m, n, k in map(sizes, args.sparse):
        for name, form in sparse_forms(m, n, k).items():
            orders = [levels.long().argsort(descending=True, stable=True) for levels in (form.row_levels, form.column_levels)]  # fmt: skip
            timed = []
            for one in (form, form.permuted(*orders)):
                with tempfile.TemporaryDirectory() as folder:
                    pairs = blocks_and_merged(one, Path(folder), args.batches, args.turns)
                timed += [Timed(one.merged_zeros, one.gathered, *pair) for pair in pairs]
            for column, layer in zip(columns, timed, strict=True):
                measured[column].append(layer)
            cells = [f"{1e6 * t.blocks:,.0f} / {1e6 * t.merged:,.0f} = {t.blocks / t.merged:.2f}" for t in timed]
            zeros, gathered = timed[0].zeros, timed[0].gathered
            rows.append((zeros, f"| {m}x{n} k = {k} | {name} | {zeros:,} | {gathered:,} | {' | '.join(cells)} |"))
    print("\n".join(row for _, row in sorted(rows)), end="\n\n")
    count = len(args.batches)
    header("zeros", *columns[count:])
    print("\n".join(limits(LIMITS, list(measured.values())[count:], lambda limit, _: limit)), end="\n\n")
    header("zeros for a gathered number", *columns[:count])
    print("\n".join(limits(SHARES, list(measured.values())[:count], lambda share, t: onnx_rewrite.MERGED + share * t.gathered)))  # fmt: skip


if __name__ == "__main__":
    main()
