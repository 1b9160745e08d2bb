"""What keys and values cost: bytes of the cache's pages, by what layers see (csrc/kv_cache.h)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .config import FrozenConfig
from .container import pad

PAGE_POSITIONS = 256  # PE_CHUNK
UNDO = 64  # PE_KV_UNDO: tokens that a sequence may lose again without computing its windows anew


class KvLayout(NamedTuple):
    """The parts of a page of 256 positions.

    data_bytes    of the layers that see everything before them
    window_bytes  of those with a window shorter than the context
    window        positions of the longest such window, 0 = there are none
    """

    data_bytes: int
    window_bytes: int
    window: int

    @classmethod
    def of_stats(cls, stats: Mapping[str, int]) -> KvLayout:
        """Of a cache whose counts are `stats`."""
        return cls(stats["page_bytes"] - stats["window_bytes"], stats["window_bytes"], stats["window"])

    @property
    def page_bytes(self) -> int:
        return self.data_bytes + self.window_bytes

    def n_bytes(self, n_tokens: int, n_new: int = 1) -> int:
        """The most that a sequence has held when it has grown to n_tokens, n_new of them in one step."""
        n_pages = -(-n_tokens // PAGE_POSITIONS)
        if self.window == 0:
            return n_pages * self.data_bytes
        # Kept positions lie in a row, and touch most pages if the first is the last one of its page.
        n_kept = self.window + UNDO - 1 + n_new
        n_windows = min(n_pages, (n_kept - 2) // PAGE_POSITIONS + 2)
        return n_pages * self.data_bytes + n_windows * self.window_bytes


def _layer_bytes(config: FrozenConfig, layer: int, kv_dtype: str) -> int:
    """Of one position: a head has its codes of K and V, padded to 16, and a scale for each of the two; a convolution its float32
    inputs, padded likewise."""
    if config.is_convolution(layer):
        return 4 * pad(config.dim, 16)
    padded = pad(config.head_dim, 16)
    return config.n_kv_heads * (2 * padded + 8 if kv_dtype == "int8" else 8 * padded)


def kv_bytes_per_position(config: FrozenConfig, kv_dtype: str = "int8") -> int:
    """Bytes of one position in all layers."""
    return sum(_layer_bytes(config, layer, kv_dtype) for layer in range(config.n_layers))


def kv_layout(config: FrozenConfig, kv_dtype: str = "int8") -> KvLayout:
    """The parts of a page of a model's cache, as the core lays them out (csrc/kv_cache.h)."""
    windows = {i: layer.window for i, layer in enumerate(config.layers) if 0 < layer.window < config.max_seq_len}
    all_bytes = PAGE_POSITIONS * kv_bytes_per_position(config, kv_dtype)
    window_bytes = PAGE_POSITIONS * sum(_layer_bytes(config, i, kv_dtype) for i in windows)
    return KvLayout(all_bytes - window_bytes, window_bytes, max(windows.values(), default=0))
