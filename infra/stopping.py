"""SIGTERM: a job ends within 30 seconds, with nothing half committed, and says how to go on.

A commit is one step of the table's log: it is there or it is not. So the job may stop at any moment; what it has
committed is found again by a rerun. A training is asked first to save what it has learned since its last checkpoint.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 25.0
"""Seconds for leases, engines and Ray to be put down; then the process ends without them."""
ASKED_S = 17.0
"""Seconds of these for a block that was asked to end by itself; then it is ended."""
REST_S = 6.0
"""Seconds of these for the last steps: Ray is left, and the log is copied to its run folder."""
CODE = 128 + signal.SIGTERM
_ending = False
_end_at = math.inf
"""Time on the monotonic clock at which the process ends in any case."""
_ask: Callable[[], None] | None = None
"""Asks the block that now runs to end by itself."""
_asked = False
"""True while a block that was asked goes on."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end. It is no Exception, so that nothing on the way takes it for a fault to retry."""


def install() -> None:
    """Takes SIGTERM over in the main thread. Ray takes it for itself at its start, so that this comes after it, too."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)


@contextmanager
def asking(ask: Callable[[], None]) -> Iterator[None]:
    """A block that SIGTERM does not break off at once: `ask` is called, and the block should end by itself.

    Raises:
        Terminated: the signal came; raised when the block has ended, or in its midst when ASKED_S are over.
    """
    global _ask, _asked
    _ask = ask
    try:
        yield
    except Exception as error:
        if _ending:
            raise Terminated from error
        raise
    finally:
        _ask, _asked = None, False
    if _ending:
        raise Terminated


def wait(seconds: float) -> None:
    """Sleeps, but after SIGTERM no longer than until the last REST_S seconds before the process ends."""
    time.sleep(max(min(seconds, _end_at - REST_S - time.monotonic()), 0.0))


def _end(number: int, frame: FrameType | None) -> None:
    global _ending, _asked, _end_at
    if _ending and not _asked:  # the first one is being obeyed
        return
    if not _ending:
        _ending, _end_at = True, time.monotonic() + GRACE_S
        _later(GRACE_S, os._exit, CODE)
        if _ask is not None:
            _asked = True
            _later(ASKED_S, os.kill, os.getpid(), signal.SIGTERM)
            _ask()
            return
    _asked = False
    raise Terminated


def _later(seconds: float, action: Callable[..., object], *given: int) -> None:
    timer = threading.Timer(seconds, action, given)
    timer.daemon = True
    timer.start()
