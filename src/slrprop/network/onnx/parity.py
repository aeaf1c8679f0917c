"""Writing rewritten ONNX models once their outputs were compared with the factors' mathematics."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from onnx import TensorProto
from torch import Tensor

from slrprop.data import Data
from slrprop.errors import SlrpropError
from slrprop.forms import Fit, Form, Quantized
from slrprop.network.onnx.feed import input_dtype
from slrprop.network.onnx.file import Feed, OnnxFile, Session
from slrprop.network.onnx.network import OnnxNetwork
from slrprop.network.onnx.rewrite import rewritten

TOLERANCE = {np.dtype(np.float16): 2e-2}  # of the largest output; sums in another order
FLOAT_TOLERANCE = 1e-4
INTEGER_TOLERANCE = 0.1  # where inputs are rounded to 8 bits too
SAMPLES = 16  # compared
SIDES = (8, 32, 224)  # tried in turn for open axes of made-up inputs


@dataclass(frozen=True)
class Parity:
    """How far a written file's outputs are from those of the original graph with the same factors multiplied out.

    ``outputs`` has the largest absolute difference of each output of real numbers; of others, the share of entries
    that differ.
    """

    outputs: dict[str, float]
    tolerance: float


def stored_as(form: Form, dtype: np.dtype) -> Form:
    """The factors with the rounding that storing them in the layer's type brings, as float32 for float16."""
    if dtype != np.float16 or isinstance(form, Quantized):
        return form
    return form.with_matrices({name: matrix.half().float() for name, matrix in form.matrices().items()})


def write(
    network: OnnxNetwork,
    fits: Mapping[str, Fit],
    moved: Mapping[str, Fit],
    orders: Mapping[str, Tensor],
    path: str | Path,
    data: Data | None,
    integers: bool = False,
) -> Parity:
    """Write the model with new factors, after its outputs were compared with those of the multiplied-out factors.

    Args:
        fits: what the layers are given, in the original order of neurons.
        moved, orders: what is written, neighbours included, in another order; that of carriers.
        data: what to compare on, its first samples; made-up inputs without it.
        integers: see :func:`slrprop.network.onnx.rewrite.rewritten`.

    Raises:
        SlrpropError: the outputs differ, the model can't be run, the file would be larger than the original, or it can't be
            written; none is left then.
    """
    dtypes = {name: network.graph.constants[network.layer(name).weight].dtype for name in fits}
    whole = {name: replace(fit, form=stored_as(fit.form, dtypes[name])).multiplied() for name, fit in fits.items()}
    plain = rewritten(network.file, whole)
    outputs = [value.name for value in network.file.proto.graph.output]
    if any(value.type.WhichOneof("value") not in (None, "tensor_type") for value in network.file.proto.graph.output):
        outputs.append(network.graph.main)  # the numbers behind a map of class names
    feed, want = _example(network, plain.session(outputs), data)
    del plain
    tolerances = [FLOAT_TOLERANCE, *(TOLERANCE.get(dtype, FLOAT_TOLERANCE) for dtype in dtypes.values())]
    tolerance = INTEGER_TOLERANCE if integers else max(tolerances)
    found: dict[str, float] = {}
    original = OnnxFile.open(network.file.path)
    flaw = original.flaw()  # the runtime takes models that the checker does not

    def check(file: OnnxFile) -> None:
        if moved and file.bytes > original.bytes:
            raise SlrpropError(
                f"the new file would take {file.bytes:,} bytes, and the original takes {original.bytes:,}; nothing was "
                f"written: plan fewer layers ({', '.join(moved)} now), or others"
            )
        new_flaw = file.flaw()
        if new_flaw and not flaw:
            raise SlrpropError(f"the new file does not pass onnx.checker: {new_flaw}; nothing was written")
        got = file.session(outputs).run(feed)
        for name in outputs:
            if isinstance(want[name], np.ndarray):
                found[name] = _difference(name, want[name], got[name], tolerance)

    rewritten(network.file, moved, integers, orders).save(path, check)
    return Parity(found, tolerance)


def _difference(name: str, want: np.ndarray, got: np.ndarray, tolerance: float) -> float:
    if want.shape != got.shape or want.dtype != got.dtype:
        raise SlrpropError(
            f"output '{name}' of the new file has shape {got.shape} instead of {want.shape}; nothing was written"
        )
    if want.dtype.kind != "f":
        return float((want != got).mean()) if want.size else 0.0
    a, b = want.astype(np.float64), got.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    largest = float(apart.max(initial=0))
    size = float(np.abs(a[np.isfinite(a)]).max(initial=0))
    if not largest <= tolerance * max(1.0, size):
        raise SlrpropError(
            f"output '{name}' of the new file differs from the factors' values by {largest:.3g}, where {tolerance:.0e} of the largest is allowed, "
            f"so nothing was written; leave out the layers that lead to it, or give other data to compare on"
        )
    return largest


def _example(network: OnnxNetwork, session: Session, data: Data | None) -> tuple[Feed, Feed]:
    """Inputs to compare on, and the outputs for them."""
    if data is not None:
        batch = next(iter(data))
        size = network.fixed_batch(batch) or min(SAMPLES, batch.samples)
        feed = network.feed(batch.take([place % batch.samples for place in range(size)]))
        return feed, network.run(session, feed)
    reasons = []
    for feed in made_up(network):
        try:
            return feed, network.run(session, feed)
        except SlrpropError as error:
            reasons.append(str(error))
    raise SlrpropError(f"{reasons[0]}; give data to compare the outputs on (made-up inputs were tried)")


def made_up(network: OnnxNetwork) -> Iterable[Feed]:
    """Random inputs of the declared types and shapes; open axes are 2 samples and, one after another, some sizes."""
    for side in SIDES:
        random, feed = np.random.default_rng(0), {}
        for value in network.graph.inputs:
            kind = value.type.tensor_type
            dtype = input_dtype(value) or np.dtype(np.float32)
            shape = [
                item.dim_value if item.dim_value > 0 else side if axis else 2
                for axis, item in enumerate(kind.shape.dim)
            ]
            if np.prod(shape, dtype=object) > 1 << 28:
                raise SlrpropError(f"input '{value.name}' of shape {tuple(shape)} is too large to make up; give data")
            if kind.elem_type == TensorProto.STRING:
                feed[value.name] = np.full(shape, "a", object)
                continue
            feed[value.name] = random.standard_normal(shape).astype(dtype) if dtype.kind == "f" else random.integers(0, 2, shape).astype(dtype)  # fmt: skip
        yield feed
