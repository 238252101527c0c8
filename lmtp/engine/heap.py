"""malloc's memory: how much is in use, and what is free given back to the system.

Nothing here may import torch: vetting.py's children use it.
"""

import contextlib
import ctypes

KEPT = 2**29
"""Bytes of free memory that may stay, as much as cog.yaml's `MALLOC_TRIM_THRESHOLD_`: a step's tensors come and go."""


class _Heap(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "ford", "keep")
    ]


def in_use() -> int:
    """The bytes that malloc has given out."""
    heap = _heap()
    return int(heap.uordblks + heap.hblkhd)


def give_back() -> None:
    """Give free memory back if there is much of it. glibc keeps it otherwise: predictions of many megabytes leave
    gigabytes. Takes a fifth of a second a gigabyte, and half a millisecond where nothing has been used since."""
    with contextlib.suppress(AttributeError):  # another libc than glibc, or an old one
        if _heap().ford > KEPT:
            ctypes.CDLL(None).malloc_trim(0)


def _heap() -> _Heap:
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Heap
    info: _Heap = mallinfo()
    return info
