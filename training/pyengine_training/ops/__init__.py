"""Operations, one file each, forward and backward side by side.

``ops.cpu`` runs them with NumPy's BLAS and Numba kernels. Every function writes into arrays that
the caller allocated (outputs first, then inputs, then scalars), allocates nothing that grows, and
keeps no state, so that another back end can offer a module of the same names and signatures.
"""
