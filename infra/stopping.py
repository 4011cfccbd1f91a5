"""SIGTERM: a job ends within 30 seconds, with nothing half committed, and says how to go on.

A commit is one step of the table's log: it is there or it is not. So the job may stop at any moment; what it has
committed is found again by a rerun.
"""

import os
import signal
import threading
from types import FrameType

GRACE_S = 25.0
"""Seconds for leases, engines and Ray to be put down; then the process ends without them."""
CODE = 128 + signal.SIGTERM
_ending = False


class Terminated(KeyboardInterrupt):
    """The process was asked to end. It is no Exception, so that nothing on the way takes it for a fault to retry."""


def install() -> None:
    """Takes SIGTERM over in the main thread. Ray takes it for itself at its start, so that this comes after it, too."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    global _ending
    if _ending:  # the first one is being obeyed
        return
    _ending = True
    guard = threading.Timer(GRACE_S, os._exit, (CODE,))
    guard.daemon = True
    guard.start()
    raise Terminated
