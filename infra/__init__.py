"""Tables, storage, sessions and run reports; it knows nothing of personas."""

import os

LOCAL = "local"
"""Value of RAY_ADDRESS for a Ray of this machine alone, which is also what its absence means."""


def keep_uv_out() -> None:
    """Tells Ray, which reads it at its import, to start workers by this process's own Python, under `uv run` too.

    Ray would start each of them through uv again, in a copy of the folder, and wait for environments that uv makes
    there. On a cluster, whose nodes may have no other environment, Ray's own way stays.
    """
    if os.environ.get("RAY_ADDRESS", LOCAL) == LOCAL:
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


keep_uv_out()
