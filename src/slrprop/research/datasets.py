"""The articles' data sets: read from a local folder, or downloaded from their official places and checked.

A folder named by ``--data`` or the environment variable ``SLRPROP_DATA`` is looked at first; it holds ``mnist.npz``,
``cifar10.npz`` or ``cifar100.npz`` (arrays ``x_train, y_train, x_test, y_test``) and ``room_occupancy.csv``, plain or with ``.xz``.
"""

import csv
import gzip
import hashlib
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from slrprop.checks import need_extra
from slrprop.errors import SlrpropError, first_line

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_FILES = {
    "x_train": ("train-images-idx3-ubyte.gz", "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873", 16),
    "y_train": ("train-labels-idx1-ubyte.gz", "md5:d53e105ee54ea40749a09fcbcd1e9432", 8),
    "x_test": ("t10k-images-idx3-ubyte.gz", "md5:9fb629c4189551a2d022fa330f9573f3", 16),
    "y_test": ("t10k-labels-idx1-ubyte.gz", "md5:ec29112dd5afa0611ce80d1b7f02629c", 8),
}
MNIST_TRAIN_MD5 = "6bbc9ace898e44ae57da46a324031adb"  # of the uncompressed train-images-idx3-ubyte
ARRAYS = tuple(MNIST_FILES)
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR_FILES = {  # the binary form, which is no pickle: archive, digest, files of both splits, bytes of labels before a row
    10: ("cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530", [*(f"data_batch_{i}.bin" for i in range(1, 6))], ["test_batch.bin"], 1),
    100: ("cifar-100-binary.tar.gz", "md5:03b5dce01913d631647c71ecec9e9cb8", ["train.bin"], ["test.bin"], 2),
}  # fmt: skip
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training images
ROOM_URL = "https://archive.ics.uci.edu/static/public/864/room+occupancy+estimation.zip"
ROOM_COUNTS = [8228, 459, 748, 694]  # rows with 0, 1, 2, 3 people, of 10 129


@dataclass(frozen=True)
class Dataset:
    """Inputs (float32) and labels (int64) of both splits."""

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


def _local(folder: str | Path | None, name: str) -> bytes | None:
    chosen = folder or os.environ.get("SLRPROP_DATA")
    if not chosen:
        return None
    for path, opener in ((Path(chosen) / name, open), (Path(chosen) / f"{name}.xz", lzma.open)):
        if path.exists():
            with opener(path, "rb") as file:
                return file.read()
    if folder:
        raise SlrpropError(
            f"data folder '{folder}' holds neither {name} nor {name}.xz; name another folder or leave --data out to download"
        )
    return None


def _download(url: str, known_hash: str | None) -> Path:
    pooch = need_extra("pooch", "research")
    try:
        return Path(pooch.retrieve(url, known_hash, path=pooch.os_cache("slrprop"), progressbar=True))
    except (OSError, ValueError) as error:  # no connection; another digest
        raise SlrpropError(
            f"{url} can't be downloaded ({type(error).__name__}); try again, or name a folder that holds the data set, "
            f"with --data or in $SLRPROP_DATA: {first_line(error)}"
        ) from error


def _idx(raw: bytes, header: int) -> np.ndarray:
    values = np.frombuffer(raw, np.uint8, offset=header)
    return values.reshape(-1, 28, 28) if header == 16 else values


def _npz(folder: str | Path | None, name: str) -> dict[str, np.ndarray] | None:
    """The arrays of both splits from the local folder, if there is one."""
    raw = _local(folder, name)
    if raw is None:
        return None
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            return {key: file[key] for key in ARRAYS}
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise SlrpropError(f"{name} can't be read: {first_line(error)}; fetch the file again") from error


def mnist(folder: str | Path | None = None) -> Dataset:
    """MNIST padded by 2 to 1 x 32 x 32, scaled to [0, 1] (LeCun et al. 1998)."""
    arrays = _npz(folder, "mnist.npz")
    if arrays is None:
        arrays = {
            key: _idx(gzip.decompress(_download(MNIST_URL + name, digest).read_bytes()), header)
            for key, (name, digest, header) in MNIST_FILES.items()
        }
    head = b"\0\0\x08\x03" + np.array([60000, 28, 28], ">u4").tobytes()
    if hashlib.md5(head + arrays["x_train"].tobytes(), usedforsecurity=False).hexdigest() != MNIST_TRAIN_MD5:
        raise SlrpropError("the MNIST training images differ from the published ones; fetch the file again")

    def images(x: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.pad(torch.from_numpy(x.copy()).float()[:, None] / 255, (2, 2, 2, 2))

    return Dataset(
        images(arrays["x_train"]), _labels(arrays["y_train"]), images(arrays["x_test"]), _labels(arrays["y_test"])
    )


def _labels(y: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(y.astype(np.int64))


def cifar(classes: int, folder: str | Path | None = None) -> Dataset:
    """CIFAR-10 or CIFAR-100 (fine labels), 3 x 32 x 32, each channel standardised (Krizhevsky 2009).

    Raises:
        SlrpropError: not the published numbers of images of each class.
    """
    name = f"cifar{classes}.npz"
    arrays = _npz(folder, name)
    if arrays is None:
        arrays = _cifar_archive(*CIFAR_FILES[classes])
    for split, count in (("train", 50_000), ("test", 10_000)):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if (
            x.shape != (count, 3, 32, 32)
            or x.dtype != np.uint8
            or np.bincount(y).tolist() != [count // classes] * classes
        ):
            raise SlrpropError(
                f"{name} holds {split} images of shape {x.shape} ({x.dtype}), not {count:,} of 3 x 32 x 32 bytes, "
                f"{count // classes} of each of {classes} classes; fetch the file again"
            )
    mean, std = (torch.tensor(values)[:, None, None] for values in (CIFAR_MEAN, CIFAR_STD))

    def images(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).float().div_(255).sub_(mean).div_(std)

    return Dataset(
        images(arrays["x_train"]), _labels(arrays["y_train"]), images(arrays["x_test"]), _labels(arrays["y_test"])
    )


def _cifar_archive(name: str, known: str, train: list[str], test: list[str], before: int) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    with tarfile.open(_download(CIFAR_URL + name, known)) as archive:
        members = {Path(member.name).name: member for member in archive if member.isfile()}
        for split, names in (("train", train), ("test", test)):
            files = [archive.extractfile(members[file]) for file in names]
            raw = np.frombuffer(b"".join(file.read() for file in files if file is not None), np.uint8)
            rows = raw.reshape(-1, before + 3072)
            found |= {f"x_{split}": rows[:, before:].reshape(-1, 3, 32, 32).copy(), f"y_{split}": rows[:, before - 1]}
    return found


def room(folder: str | Path | None = None) -> Dataset:
    """UCI Room Occupancy Estimation: 16 features, 0 to 3 people; the first 1000 rows test, the other 9129 train.

    Inputs are standardised on the training rows (Garmendia-Orbegozo et al. 2023, section 4).
    """
    raw = _local(folder, "room_occupancy.csv")
    if raw is None:
        path = _download(ROOM_URL, None)  # has no published digest, so it may be anything
        try:
            with zipfile.ZipFile(path) as archive:
                raw = archive.read("Occupancy_Estimation.csv")
        except (zipfile.BadZipFile, KeyError) as error:
            raise SlrpropError(
                f"{path} is not the room-occupancy archive: {first_line(error)}; delete it, and try again"
            ) from error
    try:
        rows = list(csv.reader(io.StringIO(raw.decode())))[1:]
        x = np.array([[float(value) for value in row[2:18]] for row in rows])
        y = np.array([int(row[18]) for row in rows])
    except (ValueError, IndexError) as error:
        raise SlrpropError(f"room_occupancy.csv can't be read: {first_line(error)}; fetch the file again") from error
    if x.shape != (10129, 16) or np.bincount(y).tolist() != ROOM_COUNTS:
        raise SlrpropError(
            f"the room-occupancy file has {x.shape} values, not the published (10129, 16) with class counts {ROOM_COUNTS}"
        )
    scaled = torch.from_numpy((x - x[1000:].mean(0)) / x[1000:].std(0)).float()
    labels = torch.from_numpy(y)
    return Dataset(scaled[1000:], labels[1000:], scaled[:1000], labels[:1000])


DATASETS: dict[str, Callable[..., Dataset]] = {
    "mnist": mnist,
    "room": room,
    "cifar10": partial(cifar, 10),
    "cifar100": partial(cifar, 100),
}
