"""A process of a group with memory of its own for keys and values: the higher its rank, the less."""

import sys
from unittest.mock import patch

from lmtp.runners import parallel

BYTES = 2 << 20
"""Of the second process."""


def memory_of(rank: int) -> int:
    """Bytes of a process's part of the memory."""
    return BYTES >> rank - 1


if __name__ == "__main__":
    rank, count = map(int, sys.argv[2:4])
    with patch.object(parallel, "default_budget", lambda _: memory_of(rank) * count):  # a machine's, which they share
        parallel._main()
