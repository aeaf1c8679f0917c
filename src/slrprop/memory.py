"""How much memory the work on a network may take: ``SLRPROP_MEMORY`` in the environment, in megabytes, is one bound for all of it.

A batch goes through a network in parts whose tensors take a quarter of it. What is kept so that nothing is computed twice (a layer's
inputs, outputs, sums, factorised Hessians) may take half of it each, or all of it, and is made anew beyond that.
"""

import ctypes
import math
import os
from typing import Any

import torch

from slrprop.errors import SlrpropError

VARIABLE, MEGABYTES = "SLRPROP_MEMORY", 256
MMAP_THRESHOLD = -3  # the number of glibc's option
LARGE = 16 << 20  # bytes of a block that the system gives and gets back alone


def bound() -> int:
    """The bound in bytes.

    Raises:
        SlrpropError: the variable holds no number of megabytes.
    """
    given = os.environ.get(VARIABLE, "").strip() or str(MEGABYTES)
    try:
        megabytes = float(given)
    except ValueError:
        megabytes = math.nan
    if not 1 <= megabytes < math.inf:
        raise SlrpropError(f"{VARIABLE} must be a number of megabytes from 1, like {MEGABYTES}, got {given[:40]!r}")
    return int(megabytes * (1 << 20))


def give_back() -> None:
    """Let the system have what was freed and lies between what is in use, and from now on large blocks as soon as they are freed.

    Both where its C library can do that, which else takes ever larger blocks, up to 32 MB, out of what lies between.
    """
    library: Any = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(library, "malloc_trim"):
        library.mallopt(MMAP_THRESHOLD, LARGE)
        library.malloc_trim(0)


def give_back_buffers() -> None:
    """Free what MKL, where torch has it, keeps for this thread's next product of matrices: megabytes for each thread."""
    free = getattr(ctypes.CDLL(torch._C.__file__), "mkl_serv_thread_free_buffers", None)
    if free is not None:
        free()
