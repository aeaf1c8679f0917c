"""What a user may hand over as data, as one stream of batches."""

import copy
import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slrprop.errors import SlrpropError

BATCH_SIZE = 512
TARGET_KEYS = ("targets", "labels", "target", "label")


class Batch(NamedTuple):
    """Inputs by position and by name, and targets where there are any."""

    inputs: tuple[Any, ...]
    named: dict[str, Any]
    targets: Tensor | None

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return self._each(move)

    @property
    def samples(self) -> int:
        """How many samples there are; 0 where the arrays differ in what their first axis counts."""
        arrays = (*self.inputs, *self.named.values(), self.targets)
        lengths = {len(array) for array in arrays if isinstance(array, Tensor) and array.ndim}
        return lengths.pop() if len(lengths) == 1 else 0

    def part(self, start: int, stop: int) -> "Batch":
        """Some of the samples."""
        return self._each(lambda value: value[start:stop] if isinstance(value, Tensor) and value.ndim else value)

    def _each(self, change: Callable[[Any], Any]) -> "Batch":
        return Batch(
            tuple(map(change, self.inputs)), {k: change(v) for k, v in self.named.items()}, change(self.targets)
        )


def as_tensor(value: Any, what: str) -> Tensor:
    """A tensor or array of finite numbers as a tensor; ``what`` names it in errors."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub" or value.dtype.itemsize > 8:
            raise SlrpropError(
                f"{what} must hold numbers, got dtype {value.dtype}; give real numbers of at most 64 bits"
            )
        value = torch.as_tensor(np.ascontiguousarray(value, value.dtype.newbyteorder("=")))
    if not isinstance(value, Tensor) or value.is_complex():
        raise SlrpropError(f"{what} must hold numbers, got {getattr(value, 'dtype', type(value).__name__)}")
    tensor = value
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise SlrpropError(f"{what} holds NaN or infinite values; clean the data first")
    return tensor


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


class Data:
    """A re-iterable stream of batches over a ``DataLoader``, arrays, or an ``.npz`` file.

    Accepted: a pair (inputs, targets) or inputs alone, as tensors or arrays; any re-iterable of batches, each
    ``inputs``, ``(inputs, ..., targets)``, a mapping (key ``targets``, ``labels``, ``target`` or ``label``, the rest by
    name) or ``(mapping, targets)``; a mapping of arrays, alone or in a pair with targets; the path of an ``.npz``, whose key
    ``targets`` holds targets and whose other arrays are inputs (one: any name; several: the names of the model's
    arguments or inputs); the path of an ``.npy`` with the only input.

    Raises:
        SlrpropError: empty, of unequal lengths, not finite, not numbers, or of an unknown type.
    """

    def __init__(self, source: Any, batch_size: int = BATCH_SIZE) -> None:
        self.batch_size = batch_size
        source = by_name(source)
        self._loader: Iterable[Any] | None = None
        self._arrays: dict[str | int, Tensor] = {}
        self._targets: Tensor | None = None
        if isinstance(source, (str, Path)):
            self._read(Path(source))
        elif _is_array(source):
            self._arrays[0] = as_tensor(source, "the input array")
        elif (
            isinstance(source, (tuple, list))
            and len(source) == 2
            and _is_array(source[0])
            and (_is_array(source[1]) or source[1] is None)
        ):
            self._arrays[0] = as_tensor(source[0], "the input array")
            self._targets = None if source[1] is None else as_tensor(source[1], "the target array")
        elif isinstance(source, Mapping) and source and all(map(_is_array, source.values())):
            self._take({str(key): as_tensor(array, f"array '{key}'") for key, array in source.items()}, "the data")
        elif isinstance(source, Iterable) and not isinstance(source, (Iterator, Mapping)):
            self._loader = source
            if isinstance(source, Sized) and len(source) == 0:
                raise SlrpropError("the data holds no batches; give at least one sample")
        else:
            raise SlrpropError(
                f"data must be a DataLoader, a pair of arrays, or the path of an .npz, got {type(source).__name__}"
                + ("; a one-time iterator can't be read twice" if isinstance(source, Iterator) else "")
            )
        self._check_lengths()

    def _read(self, path: Path) -> None:
        try:
            arrays = read_arrays(path)
        except SlrpropError:
            raise
        except (
            OSError,
            ValueError,
            EOFError,
            KeyError,
            RuntimeError,
            MemoryError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise SlrpropError(f"'{path}' can't be read as an .npz of plain arrays: {error}") from error
        self._take({key: as_tensor(array, f"array '{key}' of '{path}'") for key, array in arrays.items()}, str(path))

    def _take(self, arrays: dict[str, Tensor], what: str) -> None:
        for key in TARGET_KEYS:
            if key in arrays and self._targets is None:
                self._targets = arrays.pop(key)
        if not arrays:
            raise SlrpropError(f"'{what}' holds no input array beside the targets")
        self._arrays = dict(arrays.items()) if len(arrays) > 1 else {0: next(iter(arrays.values()))}

    def _check_lengths(self) -> None:
        if self._loader is not None:
            return
        lengths = {len(array) if array.ndim else -1 for array in self._arrays.values()}
        lengths |= set() if self._targets is None else {len(self._targets) if self._targets.ndim else -1}
        if len(lengths) > 1 or -1 in lengths:
            shapes = [tuple(array.shape) for array in (*self._arrays.values(), self._targets) if array is not None]
            raise SlrpropError(f"inputs and targets must have as many samples each, got shapes {shapes}")
        if lengths == {0}:
            raise SlrpropError("the data is empty; give at least one sample")

    def split(self, seed: int, parts: int = 2) -> "tuple[Data, Data]":
        """All but one of so many equal parts, and that one: of the samples in an order drawn from ``seed``, or of a loader's batches in turn.

        A loader's batches are put together and cut by samples where they are fewer than the parts.

        Raises:
            SlrpropError: fewer samples than parts, or a loader that shuffles (its parts would mix).
        """
        if self._loader is not None:
            if isinstance(getattr(self._loader, "sampler", None), torch.utils.data.RandomSampler):
                raise SlrpropError(
                    "the DataLoader shuffles, so its samples can't be kept apart; give one with shuffle=False"
                )
            if sum(1 for _ in itertools.islice(self._loader, parts)) < parts:
                return self._together().split(seed, parts)
            return Data(_Part(self._loader, parts, False)), Data(_Part(self._loader, parts, True))
        count = self._count
        if count < parts:
            raise SlrpropError(f"the data has {'one sample' if count == 1 else f'{count} samples'}; a search needs {parts} or more, some to choose by and others to check on")  # fmt: skip
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        cut = count * (parts - 1) // parts
        first, second = copy.copy(self), copy.copy(self)
        for part, rows in zip((first, second), (order[:cut].sort().values, order[cut:].sort().values), strict=True):
            part._arrays = {key: array[rows] for key, array in self._arrays.items()}
            part._targets = None if self._targets is None else self._targets[rows]
        return first, second

    def fewer(self, than: int) -> bool:
        """Whether there are fewer samples than that; a loader is read as far as it takes."""
        values = ((*batch.inputs, *batch.named.values()) for batch in self)
        counts = (max((len(value) for value in batch if getattr(value, "ndim", 0)), default=1) for batch in values)
        return all(count < than for count in itertools.accumulate(counts))

    @property
    def _count(self) -> int:
        return len(next(iter(self._arrays.values())))

    def _together(self) -> "Data":
        """A loader's batches as arrays."""
        batches, whole = list(self), copy.copy(self)
        named = [dict(enumerate(batch.inputs)) | batch.named for batch in batches]
        targets = [batch.targets for batch in batches if batch.targets is not None]
        try:
            whole._arrays = {key: torch.cat([batch[key] for batch in named]) for key in named[0]}
            whole._targets = torch.cat(targets) if targets else None
        except (RuntimeError, TypeError, KeyError) as error:
            raise SlrpropError(f"the data has {len(batches)} batches that can't be put together, too few to keep some for the check; give more batches") from error  # fmt: skip
        whole._loader = None
        whole._check_lengths()
        return whole

    def __iter__(self) -> Iterator[Batch]:
        if self._loader is not None:
            seen = False
            for item in self._loader:
                seen = True
                yield _batch(item)
            if not seen:
                raise SlrpropError("the data holds no batches; give at least one sample")
            return
        for start in range(0, self._count, self.batch_size):
            part = slice(start, start + self.batch_size)
            named = {key: array[part] for key, array in self._arrays.items() if isinstance(key, str)}
            inputs = tuple(array[part] for key, array in self._arrays.items() if isinstance(key, int))
            yield Batch(inputs, named, None if self._targets is None else self._targets[part])


class _Part:
    """Every n-th batch of a loader, or all others."""

    def __init__(self, loader: Iterable[Any], n: int, last: bool) -> None:
        self._loader, self._n, self._last = loader, n, last

    def __iter__(self) -> Iterator[Any]:
        return (item for place, item in enumerate(self._loader, 1) if (place % self._n == 0) == self._last)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz``, or of an ``.npy`` as the only one; none is larger than the file says it is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if path.suffix == ".npy":
        with open(path, "rb") as file:
            _check_header(file, path.stat().st_size, path)
        if path.stat().st_size > memory:
            raise SlrpropError(f"'{path}' has {path.stat().st_size:,} bytes, more than this machine's memory; split it")
        return {"input": np.load(path, allow_pickle=False)}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) != _directory_entries(path):
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
    if dtype.hasobject or math.prod(shape) * dtype.itemsize > size:
        raise SlrpropError(
            f"'{path}' holds an array of shape {shape} and type {dtype}, for which the file is too small or wrong"
        )


def _directory_entries(path: Path) -> int:
    """How many members a zip archive says it has, in the record at its end."""
    raw = path.read_bytes()[-(1 << 16) - 22 :]
    record = raw.rfind(b"PK\x05\x06")
    return int.from_bytes(raw[record + 10 : record + 12], "little")


def _batch(item: Any) -> Batch:
    batch = _parsed(item)
    arrays = (*batch.inputs, *batch.named.values(), batch.targets)
    if any(isinstance(array, Tensor) and array.ndim and not len(array) for array in arrays):
        raise SlrpropError("a batch of the data is empty; give at least one sample in each")
    return batch


def by_name(item: Any) -> Any:
    """A pair of inputs by name and targets as one mapping; anything else as it is."""
    if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], Mapping):
        inputs, targets = item
        if targets is None or _is_array(targets):
            return dict(inputs) if targets is None else {**inputs, TARGET_KEYS[0]: targets}
    return item


def _parsed(item: Any) -> Batch:
    item = by_name(item)
    if isinstance(item, Mapping):
        named = {key: as_tensor(value, f"input '{key}'") if _is_array(value) else value for key, value in item.items()}
        targets = next((named.pop(key) for key in TARGET_KEYS if key in named), None)
        return Batch((), named, targets)
    if _is_array(item):
        return Batch((as_tensor(item, "the input batch"),), {}, None)
    if isinstance(item, (tuple, list)) and item and all(_is_array(part) for part in item):
        tensors = [as_tensor(part, "the batch") for part in item]
        return Batch(tuple(tensors[:-1]), {}, tensors[-1]) if len(tensors) > 1 else Batch((tensors[0],), {}, None)
    raise SlrpropError(
        f"a batch must be a tensor, (inputs, targets) or a mapping of tensors, got {type(item).__name__}"
    )


def open_data(source: Any) -> Data:
    """``source`` as :class:`Data`."""
    return source if isinstance(source, Data) else Data(source)
