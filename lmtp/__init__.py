"""A language model behind the Language Model Transport Protocol."""

import os

# Read when torch loads libgomp. By default its threads spin for milliseconds at every barrier, and a compiled step has
# hundreds of them: where anything else wants the processor, a step was measured 180 times slower. Spinning shorter and
# then sleeping costs nothing when the processor is free, and little when it is not.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
