"""The training companion of pyengine: from raw text to a checkpoint that ``pyengine freeze`` turns
into an engine file.

Pure Python over NumPy's BLAS and Numba kernels; nothing here imports the compiled engine, and the
engine imports nothing from here. The heavy parts are imported when they are used, so ``import
pyengine_training`` costs nothing.
"""

from __future__ import annotations

__version__ = "0.1.0"
