"""The last words of a process that did not start: the error lines that it wrote before it ended."""

import os
import re
import threading
from collections import deque
from typing import Self

_ERROR = re.compile(r"\b((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception)): (.+)")
_KEPT = 500
"""Number of lines that are kept: an engine writes its traceback several times."""


class LastWords:
    """Reads along what this process and its children write to stdout and stderr, and passes it on.

    It is for a start, when no text of a user can stand in it. Children keep the pipes for life, and so do the readers.
    """

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._own: dict[int, int] = {}
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        for stream in (1, 2):
            self._own[stream] = os.dup(stream)
            read, write = os.pipe()
            os.dup2(write, stream)
            os.close(write)
            args = (read, self._own[stream])
            self._threads.append(threading.Thread(target=self._pass_on, args=args, name=f"fd {stream}", daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        for stream, own in self._own.items():
            os.dup2(own, stream)

    def _pass_on(self, read: int, to: int) -> None:
        with os.fdopen(read, "rb", buffering=0) as pipe:
            part = b""
            while block := pipe.read(1 << 16):
                os.write(to, block)
                *lines, part = (part + block).split(b"\n")
                self._lines.extend(line.decode("utf-8", "replace") for line in lines)

    def error(self) -> str | None:
        """The last error that was named, such as `AssertionError: ...`; None where there is none."""
        for thread in self._threads:
            thread.join(timeout=0.5)  # what was written last may still be in the pipe
        found = [match for line in list(self._lines) if (match := _ERROR.search(line))]
        own = [match for match in found if "Engine core" not in match[2] and "EngineDead" not in match[1]]
        return f"{own[-1][1].rpartition('.')[2]}: {own[-1][2].strip()}" if own else None
