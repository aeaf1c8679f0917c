"""Where slrprop writes: whole files or none, together where they belong together, over nothing that is read or foreign.

An output that is a link is followed. Existing files are replaced only where they are regular and of the output's own kind
(its caller says what that is), and where the command does not read them, under whatever name.

What is unfinished stands in folders called ``.slrprop-MACHINE-...``, beside the output or among the system's temporary files.
A living run holds a lock on its own; whoever makes a new one removes those beside it that nobody holds.
"""

import contextlib
import errno
import os
import platform
import re
import shutil
import signal
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any

from slrprop.errors import SlrpropError

try:
    import fcntl
except ImportError:  # Windows: no locks of this kind, so nothing is taken for left behind
    fcntl = None  # type: ignore[assignment]

PREFIX = f".slrprop-{zlib.crc32(platform.node().encode()):08x}-"  # locks of several machines may not see each other
# why an existing file can't be replaced, as the end of a sentence; nothing where it can
Refusal = Callable[[Path], str]


def require_regular(path: str | Path) -> None:
    """Refuse to read what has no end that is known: a pipe, a device."""
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise SlrpropError(f"'{path}' is no regular file (a pipe or a device); give the path of a file")


def made_folder(path: str | Path, what: str = "folder") -> Path:
    """The folder, made with those above it where it is missing.

    Raises:
        SlrpropError: it can't be made, or is no folder.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise SlrpropError(f"the {what} '{path}' can't be used ({_reason(error)}); name another one") from error
    return Path(path)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def scratch(folder: Path | None = None) -> Iterator[Path]:
    """An empty folder in ``folder`` (the system's for temporary files) for the time of a block.

    Those that killed runs left there are removed.
    """
    place = Path(tempfile.gettempdir() if folder is None else folder)
    for entry in list(os.scandir(place)) if os.access(place, os.R_OK) else []:
        if re.fullmatch(re.escape(PREFIX) + r"\w{8}", entry.name) and entry.is_dir(follow_symlinks=False):
            lock = _lock(Path(entry), wait=False)
            if lock is not None:
                shutil.rmtree(entry, ignore_errors=True)
                os.close(lock)
    while True:
        made, lock = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place)), None
        try:
            lock = _lock(made, wait=True)
            if lock is None and not made.exists():  # somebody cleaned before the lock was there
                continue
            room = made / "files"
            room.mkdir()
            yield room
            return
        finally:
            shutil.rmtree(made, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def _lock(folder: Path, wait: bool) -> int | None:
    """The open file that holds the lock on a run's folder; None where another run does, or the file system has no locks."""
    path = folder / "lock"
    if fcntl is None:
        return None
    with contextlib.suppress(OSError):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(opened), path.stat()):
                return opened
        except OSError:
            os.close(opened)
            raise
        os.close(opened)
    return None


def holding(*texts: str) -> Refusal:
    """Lets files go whose first lines hold one of the texts that tell ours."""

    def refusal(path: Path) -> str:
        with open(path, "rb") as file:
            start = file.read(1 << 12)
        ours = any(text.encode() in start for text in texts)
        return "" if ours else f"is not what slrprop writes there ({texts[0]!r} is not in its first lines)"

    return refusal


class Outputs:
    """Files that take their places at the end of a block, all or none; made by :func:`together`."""

    def __init__(self) -> None:
        self.reads: list[tuple[str, Path]] = []  # what, and where
        self.waiting: list[tuple[Path, Path, Refusal]] = []  # written, to be replaced
        self.rooms: dict[Path, Path] = {}
        self.stack = contextlib.ExitStack()

    def place(self, path: str | Path, refusal: Refusal = lambda path: "") -> Path:
        """The file that an output will be, behind all links.

        Raises:
            SlrpropError: it can't be written, is read, is no regular file, or holds what ``refusal`` does not let go.
        """
        try:
            target = Path(path).resolve()
            there = target.exists()
            if not target.parent.is_dir():
                raise OSError(errno.ENOTDIR, "its folder does not exist")
            if target.is_dir():
                raise OSError(errno.EISDIR, "it is a folder")
            if target.is_symlink() or (there and not target.is_file()):
                raise OSError(errno.EINVAL, "it is no regular file")
            for what, other in self.reads:
                if there and other.exists() and target.samefile(other):
                    raise SlrpropError(f"'{path}' is {what}, which stays as it is; name another file")
            if not os.access(target.parent, os.W_OK | os.X_OK) or (there and not os.access(target, os.R_OK | os.W_OK)):
                raise OSError(errno.EACCES, "no permission")
            if there and target.stat().st_size and (reason := refusal(target)):
                raise SlrpropError(f"'{path}' is there already and {reason}; move it away, or name another file")
        except SlrpropError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise _unwritten(path, error) from error
        return target

    def room(self, folder: Path) -> Path:
        """Where the parts of files in ``folder`` are written."""
        if folder not in self.rooms:
            self.rooms[folder] = self.stack.enter_context(scratch(folder))
        return self.rooms[folder]

    def take_places(self) -> None:
        """Everything that was written replaces what was there."""
        for part, target, refusal in self.waiting:
            self.place(target, refusal)  # again: the work may have taken hours
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        for part, target, _ in self.waiting:
            try:
                part.replace(target)
            except OSError as error:
                raise _unwritten(target, error) from error


def _unwritten(path: str | Path, error: Exception) -> SlrpropError:
    return SlrpropError(f"'{path}' could not be written ({_reason(error)}); nothing was left behind")


_current: ContextVar[Outputs | None] = ContextVar("outputs", default=None)


@contextlib.contextmanager
def together(*reads: tuple[str, Any]) -> Iterator[Outputs]:
    """What is written in the block by :func:`replacing` takes its place at the end, all or none; blocks may be nested.

    Args:
        reads: what the block reads, "the model itself" and so on, and its path; other things than paths count for nothing.
    """
    outer = _current.get()
    outputs = outer or Outputs()
    outputs.reads += [(what, Path(path)) for what, path in reads if isinstance(path, (str, Path))]
    if outer is not None:
        yield outer
        return
    token = _current.set(outputs)
    try:
        with outputs.stack:
            yield outputs
            outputs.take_places()
    finally:
        _current.reset(token)


@contextlib.contextmanager
def replacing(path: str | Path, refusal: Refusal = lambda path: "") -> Iterator[Path]:
    """Yield where to write a file of the same name, which takes the place of ``path`` on success and is gone on failure.

    Raises:
        SlrpropError: see :meth:`Outputs.place`; or the file system refused (no space).
    """
    with together() as outputs:
        target = outputs.place(path, refusal)
        try:
            part = outputs.room(target.parent) / target.name
            if part.exists():
                raise OSError(errno.EEXIST, "two outputs are this file")
            yield part
        except OSError as error:
            raise _unwritten(path, error) from error
        if part.exists():
            outputs.waiting.append((part, target, refusal))


@contextlib.contextmanager
def raising_on_signals(made: Callable[[int], BaseException]) -> Iterator[None]:
    """SIGTERM and SIGHUP raise what ``made`` makes of their number, so that what is temporary goes.

    Where one is ignored (``nohup``) it stays so.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # nothing stops the cleaning
        raise made(number)

    known = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
    before = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        before = []
    for each in before:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
