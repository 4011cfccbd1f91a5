"""The progress of a step, for a person: a bar where there is a terminal, and a line every 30 s where there is none.

Both end with one line that stays. A step that counts nothing says every 30 s that it is still at work. Only names of
steps, counts and times are shown, never a value of a row.
Steps may stand inside each other: the innermost one speaks, under the name of the outer one if it has none of its own.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, Self, TextIO

from tqdm import tqdm

from infra.job_log import terminal

EVERY_S = 30.0
"""Seconds between two lines where there is no terminal."""
_REDRAWN_S = 1.0
"""Seconds between two looks at the clock where there is one: a bar that stands still would look like a dead job."""


class Progress:
    """Counts the units of one step and shows them while it runs.

    with Progress(400, "users", "adapt, fit") as bar:
        for wave in waves:
            ...
            bar.update(len(wave))

    Args:
        total: units in all; None where nobody knows.
        unit: the name of the units, in the plural.
        step: the name of the step; the enclosing step's name when empty.
        begun: units that an earlier run had done; they count as done, but not for the rate.
        stream: place of the output; None: stderr as it is when something is written.
        clock: seconds on a clock that never goes back.
        every_s: seconds between two lines where there is no terminal.
    """

    _open: ClassVar[list["Progress"]] = []
    """Steps that run in this process, the innermost last."""

    def __init__(
        self,
        total: int | None,
        unit: str,
        step: str = "",
        *,
        begun: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = EVERY_S,
    ) -> None:
        self.total, self.unit, self.done, self.note = total, unit, begun, ""
        self.step: str = step or (self._open[-1].step if self._open else "")
        self._begun, self._given, self._clock, self._every_s = begun, stream, clock, every_s
        self._start = self._last = clock()
        self._said_within = False
        self._lock, self._over = threading.Lock(), threading.Event()
        self._bar: Any = None

    def update(self, n: int = 1, note: str | None = None) -> None:
        """Counts n more units as done.

        Args:
            note: a few words that stand behind the counts from now on, such as a loss.
        """
        self.done += n
        if note is not None:
            self.note = note
        if self._bar is not None:
            if note is not None:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        self.tick()

    def tick(self) -> None:
        """Writes a line if it is time for one; a thread calls this too, for steps that take long over one unit."""
        if self._bar is not None or (self._open and self._open[-1] is not self and self in self._open):
            return
        with self._lock:
            now = self._clock()
            if now - self._last < self._every_s:
                return
            self._last = now
            self._write(self._running(now))

    def close(self, failed: bool = False) -> None:
        """Takes the bar away and leaves one line in its place."""
        self._hide()
        if not self._said_within:  # a step inside this one has left the line, with better counts
            self._write(self._ended(self._clock(), failed))

    def __enter__(self) -> Self:
        if self._open:
            self._open[-1]._hide()  # one line at a time: the inner step has the better counts
        self._open.append(self)
        self._draw()
        wait_s = _REDRAWN_S if self._bar is not None else self._every_s
        threading.Thread(target=self._watch, args=(wait_s,), name="progress", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._over.set()
        self._open.remove(self)
        if self._open:
            self._open[-1]._said_within = True
        self.close(failed=kind is not None)
        if self._open:
            self._open[-1]._draw()

    def _draw(self) -> None:
        if is_terminal(self._stream):
            self._bar = tqdm(
                total=self.total, desc=self.step or None, unit=f" {self.unit}", initial=self.done,
                file=terminal(self._stream),
                dynamic_ncols=True, leave=False, smoothing=0.1,
            )  # fmt: skip
            self._bar.start_t -= self._clock() - self._start

    def _hide(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    def _watch(self, wait_s: float) -> None:
        while not self._over.wait(wait_s):
            bar = self._bar
            if bar is not None and not bar.disable:
                bar.refresh()
            self.tick()

    @property
    def _stream(self) -> TextIO:
        return sys.stderr if self._given is None else self._given

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _counts(self) -> str:
        if self.total is None:
            return f"{self.done:,} {self.unit}"
        return f"{self.done:,} of {self.total:,} {self.unit}"

    def _running(self, now: float) -> str:
        seconds, new = now - self._start, self.done - self._begun
        if not self.done and not self.total:
            return self._line(f"at work for {duration(seconds)}")
        parts = [self._counts() + (f" ({self.done / self.total:.0%})" if self.total else "")]
        if new > 0 and seconds > 0:
            parts.append(f"{new / seconds:,.1f} {self.unit}/s")
            if self.total is not None and self.total > self.done:
                parts.append(f"{duration((self.total - self.done) * seconds / new)} left")
        return self._line(", ".join(parts))

    def _ended(self, now: float, failed: bool) -> str:
        seconds, new = now - self._start, self.done - self._begun
        counted = f"{self._counts()} in " if self.done or self.total else ""
        rate = f" ({new / seconds:,.1f} {self.unit}/s)" if new > 0 and seconds >= 1 else ""
        if failed:
            return self._line(f"broke off{': ' + counted if counted else ' after '}{duration(seconds)}")
        return self._line(f"{counted or 'done in '}{duration(seconds)}{rate}")

    def _line(self, said: str) -> str:
        return f"{self.step + ': ' if self.step else ''}{said}{', ' + self.note if self.note else ''}"


def is_terminal(stream: TextIO) -> bool:
    """Returns whether a bar can be drawn on the stream; PPLUG_PROGRESS=1 draws one anywhere."""
    return stream.isatty() or os.environ.get("PPLUG_PROGRESS") == "1"


def duration(seconds: float) -> str:
    """Seconds in words: 0.4 s, 12 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
