"""ResNet-20 on CIFAR-10, not trained further: convolutions in one form each, shares by the search, whole files within bytes.

    python -m benchmarks.resnet [--data FOLDER] [--weights FILE] [--images 512] [--parts forms shares bytes tuned onnx]

The trained network is committed (``slrprop paper train resnet20-cifar10`` made it); forms are fitted to the first training images, without
labels; accuracy is of all 10 000 test images. *forms*: every 3 x 3 convolution but the first in one form of half, and of 35 %, of its numbers in float32, by the weights alone and fitted. *shares*: ``compress`` divides as many numbers among the layers. *bytes*: ``compress`` within 25 and
12.5 % of the file, calibrated; *tuned*: 12.5 % at the level tuned. *onnx*: the same of the exported file. Other training images check.
"""

import argparse
import resource
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

import slrprop
from benchmarks.quantisation import header
from slrprop.forms import Fit, LowRank, Spatial
from slrprop.linalg import truncated_svd
from slrprop.measure import measure
from slrprop.network.torch.find import operator_of, weight_and_bias
from slrprop.network.torch.modules import layer_from
from slrprop.network.torch.network import swapped
from slrprop.research.datasets import DATASETS
from slrprop.research.networks import ResNet20

WEIGHTS = Path(__file__).parent / "data" / "resnet20-cifar10.safetensors"
SHARES = (0.5, 0.35)


def trained(path: Path = WEIGHTS) -> nn.Module:
    """The committed network."""
    model = ResNet20()
    model.load_state_dict(load_file(path))
    return model.eval()


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """All of them."""
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Conv2d)}


def treated(model: nn.Module) -> list[str]:
    """The 3 x 3 ones but the first, which has few numbers and on which all others live."""
    return [name for name, part in convolutions(model).items() if part.kernel_size == (3, 3) and part.in_channels > 3]


def by_weights(model: nn.Module, share: float, spatial: bool) -> nn.Module:
    """Every convolution by the singular values of its weight alone: between channels, or as two of one side each."""
    made = {}
    for name in treated(model):
        part = model.get_submodule(name)
        assert isinstance(part, nn.Conv2d)
        (weight, bias), operator = weight_and_bias(part), operator_of(part)
        matrix, channels, n = operator.matrix(weight), part.in_channels, part.out_channels
        if spatial:
            rank = max(1, int(share * matrix.numel() / (3 * channels + 3 * n)))
            sides = matrix.reshape(channels, 3, 3, n).flatten(2).flatten(0, 1)  # (C k) x (l n)
            svd = truncated_svd(sides, rank)
            form: Any = Spatial((3, 3), svd.left, svd.vt.unflatten(1, (3, n)).flatten(0, 1))
        else:
            form = LowRank.from_svd(truncated_svd(matrix, max(1, int(share * matrix.numel() / sum(matrix.shape)))))
        made[name] = layer_from(Fit(form).over(bias), operator)
    return swapped(model, made).eval()


def numbers(model: nn.Module, original: nn.Module) -> float:
    """Share of the convolutions' numbers that are left, in percent."""
    kept = sum(p.numel() for name in convolutions(original) for key, p in model.get_submodule(name).named_parameters() if key != "bias")  # fmt: skip
    return 100 * kept / sum(part.weight.numel() for part in convolutions(original).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--parts", nargs="+", default=["forms", "shares", "bytes", "tuned", "onnx"])
    args = parser.parse_args()
    model, data = trained(args.weights), DATASETS["cifar10"](args.data)
    test, images, others = (data.x_test, data.y_test), data.x_train[: args.images], data.x_train[-2000:]
    before = measure(model, test)
    print(f"original: {before.accuracy:.2f} %, {before.bytes:,} bytes; {args.images} images", flush=True)
    header("what", "of the convolutions' numbers, %", "bytes", "accuracy, %", "lost", "seconds")

    def told(what: str, made: Any, seconds: float, share: float | None = None) -> None:
        found = measure(made, test)
        kept = numbers(made, model) if share is None and isinstance(made, nn.Module) else share
        print(f"| {what} | {'' if kept is None else f'{kept:.1f}'} | {found.bytes:,} | {found.accuracy:.2f} | {before.accuracy - found.accuracy:.2f} | {seconds:.0f} |", flush=True)  # fmt: skip

    def within(what: str, door: Any, size: str | int, **given: Any) -> None:
        start = time.perf_counter()
        found = slrprop.compress(door, images, check=others, max_bytes=size, **given)
        seconds = time.perf_counter() - start
        if isinstance(door, nn.Module):
            told(what, found.model, seconds, None if "float" in what else 0)
        else:
            target = Path(door).with_name("small.onnx")
            slrprop.apply(door, found.plan, target)
            told(what, target, seconds, 0)

    if "forms" in args.parts:
        for share in SHARES:
            for what, spatial in (("channel SVD", False), ("spatial", True)):
                told(f"{what}, by the weights, {share:.0%}", by_weights(model, share, spatial), 0)
            for method, given in (("low_rank", {}), ("spatial", {}), ("tucker", {"keep": 0.57 if share == SHARES[0] else 0.46})):  # fmt: skip
                start = time.perf_counter()
                share_of = {} if method == "tucker" else {"compression_rate": share}
                plan = slrprop.plan(model, images, method=method, layers=treated(model), **given, **share_of)  # fmt: skip
                told(f"{method}, fitted, {share:.0%}", slrprop.apply(model, plan), time.perf_counter() - start)
    if "shares" in args.parts:
        others_bytes = before.bytes - 4 * sum(part.weight.numel() for part in convolutions(model).values())
        for share in SHARES:
            size = others_bytes + int(4 * share * sum(part.weight.numel() for part in convolutions(model).values()))
            floats: dict[str, dict[str, Any]] = {"spatial": {}, "tucker": {}, "low_rank": {}}
            within(f"compress, float32, {share:.0%}", model, size, methods=floats, layers=treated(model), keep_batch_norm=True)  # fmt: skip
    if "bytes" in args.parts:
        for size in ("25%", "12.5%"):
            within(f"compress, calibrated, {size} of the bytes", model, size)
    if "tuned" in args.parts:
        within("compress, tuned, 12.5% of the bytes", model, "12.5%", level="tuned")
    if "onnx" in args.parts:
        path = args.weights.parent / "resnet20.onnx"
        slrprop.export_onnx(model, path, images[:2])
        within("compress, the ONNX file, calibrated, 25% of the bytes", str(path), "25%")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
