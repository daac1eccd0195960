"""Softmax by rows: each program keeps a block of rows in registers and reads them once."""

import triton
import triton.language as tl

from .arrays import array, rows, shaped
from .driver import launch

KERNELS = ("softmax",)


@triton.jit
def _softmax_forward(x, y, stride_x, stride_y, n, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, N)
    x_j = tl.load(x + row * stride_x + j, mask=j < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(x_j - tl.max(x_j, axis=0))
    tl.store(y + row * stride_y + j, (e / tl.sum(e, axis=0)).to(y.dtype.element_ty), mask=j < n)


@triton.jit
def _softmax_vjp(g, y, x_bar, stride_g, stride_y, n, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, N)
    g_j = tl.load(g + row * stride_g + j, mask=j < n, other=0.0).to(tl.float32)
    y_j = tl.load(y + row * stride_y + j, mask=j < n, other=0.0).to(tl.float32)
    x_bar_j = y_j * (g_j - tl.sum(g_j * y_j, axis=0))
    tl.store(x_bar + row * n + j, x_bar_j.to(x_bar.dtype.element_ty), mask=j < n)


class softmax:
    """y_i = e^{x_i} / Σ_j e^{x_j} along the last axis."""

    @staticmethod
    def forward(x, *, axis=-1):
        x = array(x, "x")
        count, stride = rows(x, "x")
        y, n = x.empty(x.shape), x.shape[-1]
        launch(_softmax_forward, (count,), x, y, stride, n, n, N=triton.next_power_of_2(n))
        return y.data, ()

    @staticmethod
    def vjp(g, y, x, *, axis=-1, saved, needs):
        g, y = array(g, "g"), array(y, "y")
        shaped(g, "g", y.shape)
        (count, stride_g), (_, stride_y) = rows(g, "g"), rows(y, "y")
        x_bar, n = y.empty(y.shape), y.shape[-1]
        N = triton.next_power_of_2(n)
        launch(_softmax_vjp, (count,), g, y, x_bar, stride_g, stride_y, n, N=N)
        return (x_bar.data,)
