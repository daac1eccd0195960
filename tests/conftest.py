"""Settings for all tests."""

import os

# One thread for BLAS: the tests' matrices are small, and two threads that wait for each other make
# a busy machine many times slower. Before NumPy is imported, and inherited by the tests' processes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")
