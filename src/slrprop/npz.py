"""Arrays out of ``.npz`` and ``.npy`` files, none larger than its file says it is, none that needs pickle."""

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from slrprop.errors import SlrpropError
from slrprop.files import require_regular


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz``, or of an ``.npy`` as the only one; none is larger than the file says it is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    require_regular(path)
    if path.suffix == ".npy":
        with open(path, "rb") as file:
            _check_header(file, path.stat().st_size, path)
        if path.stat().st_size > memory:
            raise SlrpropError(f"'{path}' has {path.stat().st_size:,} bytes, more than this machine's memory; split it")
        return {"input": np.load(path, allow_pickle=False)}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        raw = path.read_bytes()[-(1 << 16) - 22 :]
        record = raw.rfind(b"PK\x05\x06")  # at its end, which says how many members it has
        if len(members) != int.from_bytes(raw[record + 10 : record + 12], "little"):
            raise SlrpropError(f"the directory of '{path}' is damaged: it does not list all its arrays")
        size = sum(member.file_size for member in members)
        if size > memory:
            raise SlrpropError(f"'{path}' unpacks to {size:,} bytes, more than this machine's memory; split it")
        for member in members:
            if member.filename.endswith(".npy"):
                with archive.open(member) as part:
                    _check_header(part, member.file_size, path)
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def _check_header(file: Any, size: int, path: Path) -> None:
    """Refuse an array that claims more numbers than its file has, before memory is taken for it."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise SlrpropError(
            f"'{path}' can't be read without pickle, for it holds Python objects; save numbers, or text by array.astype(str)"
        )
    if math.prod(shape) * dtype.itemsize > size:
        raise SlrpropError(
            f"'{path}' holds an array of shape {shape} and type {dtype}, for which the file is too small or wrong"
        )
