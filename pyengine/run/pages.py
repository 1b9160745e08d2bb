"""How much memory the cache of keys and values may take."""

from __future__ import annotations

from pyengine.format.kv import KvLayout
from pyengine.system import machine_memory

# What is allowed without being told: room for so many full contexts, or for two pages of every sequence that may run.
CONTEXTS = 4
PAGES_PER_SEQUENCE = 2


def memory_bytes() -> int:
    """Memory that this process may use at most: the machine's, or the cgroup's limit."""
    limits = [machine_memory()]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                text = file.read().strip()
        except (OSError, ValueError):
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def max_pages(max_kv_bytes: int | None, *, layout: KvLayout, n_ctx: int, n_step: int, max_sequences: int) -> int:
    """Pages whose memory fits `max_kv_bytes`; None = at most half of the memory, and no more than a few full contexts need.

    Never less than one full context, n_step tokens of it in one step, and a page for the copy that sharing may cost: one
    request can always be computed.
    """
    page_bytes = layout.page_bytes
    per_context = -(-layout.n_bytes(n_ctx, n_step) // page_bytes)
    least = per_context + 1
    if max_kv_bytes is not None:
        return max(least, max_kv_bytes // page_bytes)
    wanted = max(CONTEXTS * per_context, PAGES_PER_SEQUENCE * max_sequences)
    return max(least, min(wanted, memory_bytes() // 2 // page_bytes))
