"""What the C library does with memory that tensors free on a CPU."""

import ctypes
import os
import sys

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables by which a user has chosen otherwise."""


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what this process frees, and give it out again.

    A training step frees gigabytes and allocates the same sizes in the next one. By default they
    go back to the kernel, which clears every page anew: a twentieth of a step's CPU time
    (docs/results/train_step.md). Other C libraries stay as they are, and so does one whose
    variables, such as MALLOC_MMAP_MAX_, the user has set.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _CHOSEN):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
