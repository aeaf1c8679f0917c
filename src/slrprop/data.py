"""What a user may hand over as data, as one stream of batches."""

import copy
import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slrprop.checks import require_seed
from slrprop.errors import SlrpropError, first_line
from slrprop.files import require_regular
from slrprop.losses import IGNORED

BATCH_SIZE = 512
Axes = int | Mapping[Any, int] | None  # where samples stand: of all inputs, or by input
UNREADABLE = (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError)  # what NumPy raises of a damaged file
TARGET_KEYS = ("targets", "labels", "target", "label")


class Batch(NamedTuple):
    """Inputs by position and by name, and targets where there are any; ``axes`` of inputs whose samples are not on the first."""

    inputs: tuple[Any, ...]
    named: dict[str, Any]
    targets: Any
    axes: Mapping[str | int, int] = {}

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return self.filled({key: move(value) for key, value in self.values().items()}, move(self.targets))

    def values(self) -> dict[str | int, Any]:
        """The inputs by position or name."""
        return dict([*enumerate(self.inputs), *self.named.items()])

    def sizes(self) -> set[int]:
        """How many samples the inputs hold; those without axes count for nothing."""
        return {value.shape[self.axes.get(key, 0)] for key, value in self.values().items() if _axes_of(value)}

    @property
    def samples(self) -> int:
        """How many there are."""
        return min(self.sizes(), default=1)

    @property
    def divisible(self) -> bool:
        """Whether all inputs, and the targets, agree in how many there are."""
        return len(self.sizes() | ({len(self.targets)} if _axes_of(self.targets) else set())) == 1

    def take(self, rows: slice | list[int]) -> "Batch":
        """Some of the samples; numbers without axes, and what is no array, belong to each."""

        def part(value: Any, axis: int = 0) -> Any:
            return value[(slice(None),) * axis + (rows,)] if _axes_of(value) else value

        found = {key: part(value, self.axes.get(key, 0)) for key, value in self.values().items()}
        return self.filled(found, part(self.targets))

    def filled(self, values: Mapping[Any, Any], targets: Any) -> "Batch":
        """A batch like this one of other values by position or name, and targets."""
        return Batch(tuple(map(values.get, range(len(self.inputs)))), {name: values[name] for name in self.named}, targets, self.axes)  # fmt: skip


def _axes_of(value: Any) -> int:
    return getattr(value, "ndim", 0)


def as_tensor(value: Any, what: str) -> Tensor:
    """A tensor or array of finite numbers as a tensor; ``what`` names it in errors."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub" or value.dtype.itemsize > 8:
            raise SlrpropError(
                f"{what} must hold numbers, got dtype {value.dtype}; give real numbers of at most 64 bits"
            )
        value = torch.as_tensor(np.ascontiguousarray(value, value.dtype.newbyteorder("=")).reshape(value.shape))
    if not isinstance(value, Tensor) or value.is_complex():
        raise SlrpropError(f"{what} must hold numbers, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch stores these and computes nothing with them
        if value.dtype == torch.uint64 and value.numel() and (value.view(torch.int64) < 0).any():
            raise SlrpropError(f"{what} holds whole numbers of 2^63 or more; give smaller ones")
        value = value.to(torch.int64)
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise SlrpropError(f"{what} holds NaN or infinite values; clean the data first")
    return value


def _as_values(value: Any, what: str) -> Any:
    """Numbers as a tensor, text as an array of objects."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "UO" and all(isinstance(word, str) for word in value.flat):
        return value.astype(object)
    return as_tensor(value, what)


def content(tensor: Tensor) -> Any:
    """A tensor's bytes, for a digest."""
    flat = tensor.detach().cpu().reshape(-1)
    flat = flat if flat.stride() == (1,) else flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


class Data:
    """A re-iterable stream of batches over a ``DataLoader``, arrays, or an ``.npz`` file.

    Accepted: a pair (inputs, targets) or inputs alone, as tensors or arrays; any re-iterable of batches, each
    ``inputs``, ``(inputs, ..., targets)``, a mapping (key ``targets``, ``labels``, ``target`` or ``label``, the rest by
    name) or ``(mapping, targets)``; a mapping of arrays, alone or in a pair with targets; the path of an ``.npz``, whose key
    ``targets`` holds targets and whose other arrays are inputs (one: any name; several: the names of the model's
    arguments or inputs); the path of an ``.npy`` with the only input.

    Args:
        class_axis: the axis of the network's outputs that holds the classes; found by default.
        ignore_label: a label that leaves its row out; -100, as in torch's cross-entropy, always does.
        batch_axis: where samples stand: an axis for all inputs, or by input (its name, or its position where it has none) the
            axis of those whose samples are not on the first; likewise of ``targets``. By default the first axis, which is tried
            on the network.

    Raises:
        SlrpropError: empty, of unequal lengths, not finite, neither numbers nor text, or of an unknown type.
    """

    def __init__(
        self,
        source: Any,
        batch_size: int = BATCH_SIZE,
        class_axis: int | None = None,
        ignore_label: int | None = None,
        batch_axis: Axes = None,
    ) -> None:
        self.batch_size, self.class_axis, self.ignore_label = batch_size, class_axis, ignore_label
        self.batch_axis = batch_axis
        source = by_name(source)
        self._loader: Iterable[Any] | None = None
        self._whole = Batch((), {}, None)  # of arrays
        pair = source if isinstance(source, (tuple, list)) and len(source) == 2 else (source, None)
        if isinstance(source, (str, Path)):
            self._read(Path(source))
        elif _is_array(pair[0]) and (_is_array(pair[1]) or pair[1] is None):
            targets = {} if pair[1] is None else {"targets": _as_values(pair[1], "the target array")}
            self._take({"": _as_values(pair[0], "the input array")} | targets)
        elif isinstance(source, Mapping) and source and all(map(_is_array, source.values())):
            self._take({str(key): _as_values(array, f"array '{key}'") for key, array in source.items()})
        elif isinstance(source, Iterable) and not isinstance(source, (Iterator, Mapping)):
            self._loader = source
            if isinstance(source, Sized) and len(source) == 0:
                raise SlrpropError("the data holds no batches; give at least one sample")
        else:
            raise SlrpropError(
                f"data must be a DataLoader, a pair of arrays, or the path of an .npz, got {type(source).__name__}"
                + ("; a one-time iterator can't be read twice" if isinstance(source, Iterator) else "")
            )

    def _read(self, path: Path) -> None:
        try:
            arrays = read_arrays(path)
        except SlrpropError:
            raise
        except (*UNREADABLE, zipfile.BadZipFile, zlib.error) as error:
            raise SlrpropError(f"'{path}' can't be read as an .npz of plain arrays: {first_line(error)}") from error
        self._take({key: _as_values(array, f"array '{key}' of '{path}'") for key, array in arrays.items()}, str(path))

    def _take(self, given: dict[str, Any], where: str = "the data") -> None:
        targets = next((given.pop(key) for key in TARGET_KEYS if key in given), None)
        if not given:
            raise SlrpropError(f"'{where}' holds no input array beside the targets")
        (first, *more) = given
        batch = Batch((), given, targets) if more else Batch((given[first],), {}, targets)
        self._whole = _placed(batch, self.batch_axis, first)
        lengths = self._whole.sizes()
        lengths |= set() if targets is None else {len(self._whole.targets) if targets.ndim else -1}
        if len(lengths) != 1 or -1 in lengths:
            shapes = [tuple(array.shape) for array in (*given.values(), targets) if array is not None]
            raise SlrpropError(
                f"inputs and targets must have as many samples each, got shapes {shapes}{_another_axis(given, targets)}"
            )
        if lengths == {0}:
            raise SlrpropError("the data is empty; give at least one sample")

    def split(self, seed: int, parts: int = 2) -> "tuple[Data, Data]":
        """All but one of so many equal parts, and that one: of the samples in an order drawn from ``seed``, or of a loader's batches in turn.

        A loader's batches are put together and cut by samples where they are fewer than the parts.

        Raises:
            SlrpropError: fewer samples than parts, or a loader that shuffles (its parts would mix).
        """
        first, second = copy.copy(self), copy.copy(self)
        if self._loader is not None:
            if isinstance(getattr(self._loader, "sampler", None), torch.utils.data.RandomSampler):
                raise SlrpropError(
                    "the DataLoader shuffles, so its samples can't be kept apart; give one with shuffle=False"
                )
            if sum(1 for _ in itertools.islice(self._loader, parts)) < parts:
                return self._together().split(seed, parts)
            first._loader, second._loader = _Part(self._loader, parts, False), _Part(self._loader, parts, True)
            return first, second
        count = self._whole.samples
        if count < parts:
            raise SlrpropError(f"the data has {'one sample' if count == 1 else f'{count} samples'}; a search needs {parts} or more, some to choose by and others to check on")  # fmt: skip
        order = torch.randperm(count, generator=torch.Generator().manual_seed(require_seed(seed)))
        cut = count * (parts - 1) // parts
        for part, rows in zip((first, second), (order[:cut], order[cut:]), strict=True):
            part._whole = self._whole.take(rows.sort().values.tolist())
        return first, second

    def fewer(self, than: int) -> bool:
        """Whether there are fewer samples than that; a loader is read as far as it takes."""
        return all(count < than for count in itertools.accumulate(batch.samples for batch in self))

    def _together(self) -> "Data":
        """A loader's batches as one."""
        batches, whole = list(self), copy.copy(self)
        first, values = batches[0], [batch.values() for batch in batches]
        targets = [batch.targets for batch in batches if batch.targets is not None]
        try:
            found = {key: torch.cat([value[key] for value in values], first.axes.get(key, 0)) for key in values[0]}
            one = torch.cat(targets) if targets else None
        except (RuntimeError, TypeError, KeyError) as error:
            raise SlrpropError(f"the data has {len(batches)} batches that can't be put together, too few to keep some for the check; give more batches") from error  # fmt: skip
        whole._whole, whole._loader = first.filled(found, one), None
        return whole

    def __iter__(self) -> Iterator[Batch]:
        if self._loader is not None:
            seen = False
            for item in self._loader:
                seen = True
                yield self._marked(_placed(_batch(item), self.batch_axis))
            if not seen:
                raise SlrpropError("the data holds no batches; give at least one sample")
            return
        for start in range(0, self._whole.samples, self.batch_size):
            yield self._marked(self._whole.take(slice(start, start + self.batch_size)))

    def _marked(self, batch: Batch) -> Batch:
        """A batch whose labels to be ignored are those of :data:`slrprop.losses.IGNORED`."""
        labels = batch.targets
        if self.ignore_label is None or not isinstance(labels, Tensor) or labels.is_floating_point():
            return batch
        return batch._replace(targets=labels.long().masked_fill(labels == self.ignore_label, IGNORED))


def _placed(batch: Batch, given: Axes, name: str = "") -> Batch:
    """A batch with what was said of its axes, targets with their samples first; ``name`` is that of an only input."""
    if given is None:
        return batch
    values = {key: value for key, value in batch.values().items() if _axes_of(value)}
    told: dict[Any, Any] = dict(given) if isinstance(given, Mapping) else dict.fromkeys(values, given)
    if list(values) == [0]:  # by whatever name
        told = {0 if key not in TARGET_KEYS and name in ("", key) else key: axis for key, axis in told.items()}
    of_targets = next((told.pop(key) for key in TARGET_KEYS if key in told), None)
    known = values | {"targets": batch.targets}
    for key, axis in (told if of_targets is None else told | {"targets": of_targets}).items():
        if type(axis) is not int or not 0 <= axis < _axes_of(known.get(key)):
            shapes = ", ".join(f"{name or key} {tuple(value.shape)}" for key, value in values.items())
            raise SlrpropError(
                f"batch_axis says {axis!r} of '{key or name or 0}', which is no axis of the inputs {shapes}"
            )
    batch = batch._replace(axes={key: axis for key, axis in told.items() if axis})
    if _axes_of(batch.targets) < 2:
        return batch
    if of_targets is None:
        shape = tuple(batch.targets.shape)
        fitting = {axis for axis in (0, given) if isinstance(axis, int) and shape[axis : axis + 1] == (batch.samples,)}
        if len(fitting) > 1:
            raise SlrpropError(f"targets of shape {shape} may have their samples on either axis; name it too (--batch-axis targets=0)")  # fmt: skip
        of_targets = max(fitting, default=0)
    moved = np.moveaxis if isinstance(batch.targets, np.ndarray) else torch.movedim
    return batch._replace(targets=moved(batch.targets, of_targets, 0))


def _another_axis(inputs: Mapping[str, Any], targets: Any) -> str:
    """How to say that samples stand on another axis, where all arrays have one of the same length."""
    shapes = [tuple(array.shape) for array in (*inputs.values(), targets) if _axes_of(array)]
    common = set.intersection(*map(set, shapes)) if shapes else set()
    count = len(targets) if _axes_of(targets) else min(common, default=-1)
    axes = {name: shape.index(count) for name, shape in zip(inputs, shapes, strict=False) if count in common}
    said = " ".join(f"--batch-axis {'' if len(inputs) == 1 else f'{name}='}{axis}" for name, axis in axes.items() if axis)  # fmt: skip
    return f"; if the {count} samples stand on another axis, say so with {said} (batch_axis in Python)" if said else ""


class _Part:
    """Every n-th batch of a loader, or all others."""

    def __init__(self, loader: Iterable[Any], n: int, last: bool) -> None:
        self._loader, self._n, self._last = loader, n, last

    def __iter__(self) -> Iterator[Any]:
        return (item for place, item in enumerate(self._loader, 1) if (place % self._n == 0) == self._last)


def _batch(item: Any) -> Batch:
    batch = _parsed(item)
    if isinstance(batch.targets, Tensor) and not batch.targets.ndim:
        shapes = ", ".join(str(tuple(value.shape)) for value in batch.values().values() if isinstance(value, Tensor))
        raise SlrpropError(
            f"an item of the data is one sample (an input of shape {shapes}, and one target) and no batch; give a DataLoader, or the samples stacked into one array"
        )
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
        named = {key: _as_values(value, f"input '{key}'") if _is_array(value) else value for key, value in item.items()}
        targets = next((named.pop(key) for key in TARGET_KEYS if key in named), None)
        return Batch((), named, targets)
    if _is_array(item):
        return Batch((_as_values(item, "the input batch"),), {}, None)
    if isinstance(item, (tuple, list)) and item and all(_is_array(part) for part in item):
        tensors = [_as_values(part, "the batch") for part in item]
        return Batch(tuple(tensors[:-1]), {}, tensors[-1]) if len(tensors) > 1 else Batch((tensors[0],), {}, None)
    raise SlrpropError(
        f"a batch must be a tensor, (inputs, targets) or a mapping of tensors, got {type(item).__name__}"
    )


def open_data(
    source: Any, class_axis: int | None = None, ignore_label: int | None = None, batch_axis: Axes = None
) -> Data:
    """``source`` as :class:`Data`, with these settings where they are given."""
    if isinstance(source, Data) and batch_axis is not None:
        raise SlrpropError("say batch_axis where the data is opened: Data(arrays, batch_axis=1)")
    data = copy.copy(source) if isinstance(source, Data) else Data(source, batch_axis=batch_axis)
    for name, value in (("class_axis", class_axis), ("ignore_label", ignore_label)):
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int):
                raise SlrpropError(f"{name} must be a whole number, got {value!r}")
            setattr(data, name, value)
    return data


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
