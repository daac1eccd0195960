"""The GPU kernels of kernels/gpu, compiled without a GPU and raced against PyTorch on one.

workloads.py    what is run: kernels at shapes that matter, and the same in PyTorch
variants.py     options of the kernels that are compiled, too, but not raced
gate.py         compiles all of it for several chips and inspects the machine code
race.py         correctness, then time, on a GPU
picture.py      the roofline
"""
