"""Triton kernels, one file for each file of `ops/`, with the ops' names. They stand on their own:

    from tinygrad_llm.kernels.gpu.reduce import softmax

    y, saved = softmax.forward(x)                                    # x: CuPy, PyTorch, DLPack
    (x_bar,) = softmax.vjp(g, y, x, saved=saved, needs=(True,))

A kernel is a class with two static methods, as in kernels/cpu:

    forward(*arrays, **attributes) -> (y, saved)
    vjp(g, y, *arrays, saved, needs, **attributes) -> as many gradients as `needs` has entries, None
                                                      where it says False; `saved` is forward's

Each module lists its kernels in KERNELS (an op's) and FUSED (several ops in one).
The rules:

- What a kernel cannot take (dtypes, shapes, strides) is a TypeError or ValueError of one line
  before anything is launched.
- Arrays of float32, float16 and bfloat16; sums are kept in float32; outputs have the inputs' dtype.
- Nothing that a kernel did not make is written to, except where its name says so.
- The same call gives the same bits: no floating-point atomics.
- No PyTorch: see driver.py for launching, arrays.py for memory, tuning.py for tile sizes.
"""

import importlib.util

if importlib.util.find_spec("triton") is None:
    raise ModuleNotFoundError("the GPU kernels need Triton: pip install -e '.[gpu]'")
