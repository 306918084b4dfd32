"""Our Triton kernels for training: the small operations between the matrix products, forward and backward.

Each file holds one operation: its kernels, the autograd function, and under ``*_reference`` the plain torch
that it must equal. Configurations are explicit, so nothing is tuned and a shape's first use compiles once.
``chunks`` and ``fast_math`` hold what several kernels share; the delta rule (``delta_rule``) is made of ``wy``,
``read_out`` and ``chunk_gradient``.
"""
