"""In-place, blocked NumPy, one file for each file of `ops/`, with the ops' names.

A kernel is a class with two static methods:

    forward(*arrays, **attributes) -> (y, saved)
    vjp(g, y, *arrays, saved, needs, **attributes) -> gradients, None where `needs` says False

and, if it cannot do every case, accepts(*arrays, **attributes) -> bool. Each module lists its
kernels in KERNELS. Nothing that a kernel did not make may be written to: not its arguments, not
`g`.
"""
