"""The processor cores that this process may keep busy: in a container they may be fewer than the machine has.

`os.cpu_count()` counts the host's cores: with 96 threads under a limit of 8 cores, the kernel stops all of them for
most of each tenth of a second.
"""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
"""Files with microseconds of work and those of the period within which they may be used: cgroup v2, then v1."""


def cores() -> int:
    """Number of whole cores, at least 1: those of the machine that this process may run on, or the container's limit
    where that is less."""
    found = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux alone
        found = min(found, len(os.sched_getaffinity(0)))
    return max(1, min(found, *map(_limit, _LIMITS)))


def _limit(names: tuple[str, ...]) -> int:
    """Whole cores of a limit; more than any machine has where there is none."""
    try:
        quota, period = (int(word) for name in names for word in (CGROUP / name).read_text().split())
    except (OSError, ValueError):  # no such file, or the word `max`
        return 2**31
    return quota // period if quota > 0 and period > 0 else 2**31
