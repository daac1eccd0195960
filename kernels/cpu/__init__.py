"""In-place, blocked NumPy, one file for each file of `ops/`, with the ops' names.

A kernel is a class with two static methods:

    forward(*arrays, **attributes) -> (y, saved)
    vjp(g, y, *arrays, saved, needs, **attributes) -> gradients, None where `needs` says False

and, if it cannot do every case, accepts(*arrays, **attributes) -> bool. Each module lists its
kernels in KERNELS (an op's) and FUSED (several ops in one). The rules:

- Arithmetic in place is for float32 and float64: `accepts` leaves other dtypes to the op.
- Work that falls into pieces is shared out among the team of threads, if there is one: see
  threads.py. Each piece writes where no other one does.
- Nothing that a kernel did not make may be written to: not its arguments, not `g`, not `saved`.
- A gradient is a fresh array, which the engine may add to: never `g` or a view of it. Where it is
  zero but for a part, it may be a function add_to(total), which adds that part to an array in
  place.
"""

import ctypes
import platform


def _keep_freed_memory():
    """Lets glibc reuse freed arrays instead of returning them to the system after each step.

    A training step frees and makes the same few hundred arrays again and again. Each one that comes
    fresh from the system costs a page fault for every 4 KB, more than the arithmetic on it.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # from malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(m_mmap_threshold, 1 << 30) or mallopt(m_mmap_threshold, 1 << 25)  # what old ones allow
    mallopt(m_trim_threshold, (1 << 31) - 1)
    mallopt(m_top_pad, 64 << 20)


if platform.libc_ver()[0] == "glibc":
    _keep_freed_memory()
