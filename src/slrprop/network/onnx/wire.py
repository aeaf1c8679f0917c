"""Just enough of the protobuf wire format to cut large fields out of a message, and to put them back."""

from collections.abc import Iterator
from typing import Any

Field = tuple[int, int, int, int]  # number, start, start of the payload, end


def _varint(buffer: Any, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = buffer[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a length in the file is cut off")


def fields(buffer: Any, start: int, end: int) -> Iterator[Field]:
    """The fields of one protobuf message."""
    at = start
    while at < end:
        first = at
        key, at = _varint(buffer, at, end)
        if (kind := key & 7) == 0:
            payload, (_, at) = at, _varint(buffer, at, end)
        elif kind == 2:
            length, payload = _varint(buffer, at, end)
            at = payload + length
        elif kind in (1, 5):
            payload, at = at, at + (8 if kind == 1 else 4)
        else:
            raise ValueError("it is no protobuf message")
        if at > end:
            raise ValueError("it ends in the middle of a field; the file is cut off")
        yield key >> 3, first, payload, at


def head(number: int, length: int) -> bytes:
    """Key and length of a field of bytes."""
    out = bytearray()
    for value in (number << 3 | 2, length):
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


def around(message: bytes, number: int) -> tuple[bytes, bytes]:
    """A serialised message in two parts, between which field ``number`` belongs."""
    place = next((start for found, start, _, _ in fields(message, 0, len(message)) if found > number), len(message))
    return message[:place], message[place:]
