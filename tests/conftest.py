"""Settings for all tests."""

import ctypes
import os
import signal

# One thread for BLAS: the tests' matrices are small, and two threads that wait for each other make
# a busy machine many times slower. Before NumPy is imported, and inherited by the tests' processes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


# A shell's background job ignores Ctrl-C, and so would the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def a_gpu_is_here():
    """Whether NVIDIA's driver finds one."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


os.environ.pop("COLUMNS", None)  # of pytest-xdist; what a command prints would follow it

# Without a GPU its kernels run in Triton's interpreter: decided before Triton is imported.
if not a_gpu_is_here():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings  # noqa: E402

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")


def pytest_make_parametrize_id(val):
    """Tests are named alike in every process: by a function's or an object's own name."""
    name = getattr(val, "__name__", None) or getattr(val, "name", None)
    return name if isinstance(name, str) else None


def pytest_collection_modifyitems(items):
    """`pytest -m gpu`: what runs on a GPU where there is one, and is interpreted where not."""
    for item in items:
        if item.path.stem.startswith(
            ("test_gpu_", "test_device", "test_step", "test_generate_device")
        ):
            item.add_marker("gpu")
