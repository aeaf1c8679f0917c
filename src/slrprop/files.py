"""Writing files so that a half-written one never stays."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slrprop.errors import SlrpropError


def require_seen(path: Path) -> Path:
    """A file that another process has written, by a path that must mean the same on its machine."""
    if not path.exists():
        raise SlrpropError(
            f"'{path}' is not seen here; machines that work together need a folder that all of them see (--run-dir), "
            "and a database that all of them reach (--database)"
        )
    return path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes the place of ``path``, on failure it is removed.

    Raises:
        SlrpropError: the file system refused (no such folder, no space, no permission).
    """
    target = Path(path)
    part: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
        os.close(handle)
        part = Path(name)
        yield part
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise SlrpropError(
            f"'{target}' could not be written ({error.strerror or error}); nothing was left behind"
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
