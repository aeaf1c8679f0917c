"""Mutated files against every reader: each must end in a clean error or the right result.

    python -m benchmarks.fuzz [--count 1000] [--seed 0]

Readers: plan (JSON), model (safetensors), data (.npz, plain and compressed), ONNX. A mutation flips bits of one to three
bytes, cuts the file, or appends to it. Prints how many were refused, how many read right, and anything else.
ONNX files carry no checksum, so a flipped weight gives another model: there any result counts, an exception does not.
"""

import argparse
import collections
import random
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import slrprop
from slrprop import SlrpropError
from tests.test_bad_input import FILES, network, samples


def onnx_file(path: Path) -> None:
    slrprop.export_onnx(network(), path, samples()[0])


def through_onnx(path: Path) -> Any:
    model = path.rename(path.with_suffix(".onnx"))
    plan = slrprop.plan(model, samples(), method="slr", rank=2)
    slrprop.apply(model, plan, path.with_name("small.onnx"))


def mutated(raw: bytes, chance: random.Random) -> bytes:
    how = chance.random()
    if how < 0.15:
        return raw[: chance.randrange(len(raw))]
    if how < 0.2:
        return raw + chance.randbytes(chance.randint(1, 50))
    content = bytearray(raw)
    for _ in range(chance.randint(1, 3)):
        content[chance.randrange(len(content))] ^= chance.randint(1, 255)
    return bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    readers: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
        **FILES,
        "ONNX": (onnx_file, through_onnx),
    }
    for kind, (write, read) in readers.items():
        chance, seen = random.Random(args.seed), collections.Counter[str]()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file.npz"
            write(path)
            raw = path.read_bytes()
            right = None if kind == "ONNX" else read(path)
            for _ in range(args.count):
                path.write_bytes(mutated(raw, chance))
                try:
                    found = read(path)
                    seen["read" if right is None or torch.equal(found, right) else "OTHER RESULT"] += 1
                except SlrpropError as error:
                    seen["refused" if "\n" not in str(error) else "MORE THAN A SENTENCE"] += 1
                except Exception as error:
                    seen[f"{type(error).__name__}: {error}"[:150]] += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{kind}: {args.count} mutated files: {dict(seen)}; peak memory so far {peak:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
