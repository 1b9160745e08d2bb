"""Operations, one file each, forward and backward side by side.

``ops.cpu`` runs them with NumPy's BLAS and Numba kernels, ``ops.cuda`` on a GPU: the same names, the same signatures.
A function writes into arrays that the caller allocated (outputs first, then inputs, then scalars, then ``scratch``).

What an operation needs beside inputs and outputs it declares, as :class:`.needs.Need` by name:
``<op>_state`` is what the forward keeps for its backward, ``<op>_scratch`` is working memory whose contents do not
outlive a call. The caller allocates both with :func:`.needs.allocate` and passes them; one scratch serves any number of
calls that do not run at the same time.
"""
