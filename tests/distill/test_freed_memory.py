"""Memory that is freed is given out again, without new pages from the kernel."""

import os
import platform
import subprocess
import sys

import pytest

PAGES = """
import resource
import numpy as np
from distill.freed_memory import keep_freed_memory
keep_freed_memory()
def fill():
    np.ones(16 << 20, np.float32)  # 64 MiB: 16,384 pages
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc's malloc")
def test_an_array_of_a_freed_ones_size_needs_no_new_pages():
    def faults(**variables: str) -> int:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
        command = [sys.executable, "-c", PAGES]
        done = subprocess.run(command, env=kept | variables, capture_output=True, check=True)
        return int(done.stdout)

    # NumPy asks for huge pages where it may, which are fewer
    small = {"NUMPY_MADVISE_HUGEPAGE": "0"}
    assert faults(**small) < 100
    # a user's own choice is left alone
    assert faults(**small, MALLOC_MMAP_MAX_="65536") > 100
