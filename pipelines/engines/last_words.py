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
    """Reads along what this process and its children write to stderr, and passes it on.

    It is for a start, when no text of a user can stand in it. Children keep the pipe for life, and so does its reader.
    """

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT)

    def __enter__(self) -> Self:
        self._stderr = os.dup(2)
        read, write = os.pipe()
        os.dup2(write, 2)
        os.close(write)
        self._thread = threading.Thread(target=self._pass_on, args=(read,), name="stderr", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.dup2(self._stderr, 2)

    def _pass_on(self, read: int) -> None:
        with os.fdopen(read, "rb", buffering=0) as pipe:
            part = b""
            while block := pipe.read(1 << 16):
                os.write(self._stderr, block)
                *lines, part = (part + block).split(b"\n")
                self._lines.extend(line.decode("utf-8", "replace") for line in lines)

    def error(self) -> str | None:
        """The last error that was named, such as `AssertionError: ...`; None where there is none."""
        self._thread.join(timeout=1.0)  # what was written last may still be in the pipe
        found = [match for line in list(self._lines) if (match := _ERROR.search(line))]
        own = [match for match in found if "Engine core" not in match[2] and "EngineDead" not in match[1]]
        return f"{own[-1][1].rpartition('.')[2]}: {own[-1][2].strip()}" if own else None
