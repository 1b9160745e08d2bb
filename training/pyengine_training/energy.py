"""Energy of the processor packages, where Linux exposes the counters (powercap) and lets us read them."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules used by all packages since the last call; None where the machine does not say."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = sorted(root.glob("intel-rapl:[0-9]*")) if root.is_dir() else []
        # packages, not parts of them
        self._zones = [zone for zone in self._zones if zone.name.count(":") == 1]
        self._last = self._read()

    def _read(self) -> list[tuple[int, int]] | None:
        """(counter, range) in microjoules of every zone."""
        try:
            values = [
                (
                    int((zone / "energy_uj").read_text()),
                    int((zone / "max_energy_range_uj").read_text()),
                )
                for zone in self._zones
            ]
        except (OSError, ValueError):
            return None
        return values or None

    def joules(self) -> float | None:
        """Since construction or the last call; counters that wrapped once are handled."""
        before, now = self._last, self._read()
        self._last = now
        if before is None or now is None:
            return None
        pairs = zip(before, now, strict=True)
        return sum((new - old) % max(1, size) for (old, size), (new, _) in pairs) / 1e6


def add_joules(total: float | None, more: float | None) -> float | None:
    """The sum of what is known; None only while nothing is."""
    return total if more is None else (total or 0.0) + more
