"""A language model behind the Language Model Transport Protocol."""

import contextlib
import ctypes
import os

# Read when torch loads libgomp. By default its threads spin for milliseconds at every barrier, and a compiled step has
# hundreds of them: where anything else wants the processor, a step was measured 180 times slower. Spinning this long
# and then sleeping costs nothing when the processor is free; ten times as long doubles a step beside a process that
# never rests.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# Tensors of some megabytes come and go in every step. By default glibc gives their memory back to the system each time,
# most of all in other threads than the first, and the system zeroes it page by page when it is asked for again: half of
# the time of sampling, a tenth of a long prompt's. Tensors of 32 MB and more cannot be kept that way. See mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
if not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
    with contextlib.suppress(AttributeError):  # another C library
        for parameter, value in ((M_TRIM_THRESHOLD, 2**29), (M_MMAP_THRESHOLD, 2**25), (M_ARENA_MAX, 1)):
            ctypes.CDLL(None).mallopt(parameter, value)

__version__ = "0.1.0"
