"""A job's output: a person sees the job's own lines and errors, and job.log in the run folder has everything.

Route: sys.stdout and sys.stderr of this process (Ray prints its workers' lines there too) -> lines -> job.log, and
those that `infra.noise` lets through -> the former streams. Texts that the person has asked to see (`show`) go past all
this, to the screen alone. What libraries in C++ write to file descriptor 2, past
Python, goes to job.log alone, by the descriptor itself: it is there even if the process dies with it.
With `as_json` each of these lines is one JSON object with time, job, run_id, stream and message, in the log and on the
screen; what is written by the descriptor stays as it is.
The log begins as a local temporary file, since a job knows its run folder only after it has read its config. For a run
folder on S3 it stays there and is copied at the end.
"""

import io
import json
import os
import sys
import tempfile
import threading
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, ClassVar, Self, TextIO, cast

from tqdm import tqdm

from infra.noise import Filter, has_traceback, is_bar, plain
from infra.storage import Storage

NAME = "job.log"
LINE_LOG = "line.log"
"""Name of the log of a job that runs jobs, which leave theirs below the same folder or in it."""


class JobLog:
    """Takes the process's output while a job runs. The logs of jobs that run jobs stand inside each other.

    Args:
        job: name of the job.
        debug: everything is shown.
        as_json: lines are JSON objects, for a collector of logs.
    """

    current: ClassVar["JobLog | None"] = None
    """The log of the job that runs in this process, the innermost one."""

    def __init__(self, job: str, debug: bool = False, as_json: bool = False) -> None:
        self.job, self.run_id = job, ""
        self.debug: bool = debug or (JobLog.current is not None and JobLog.current.debug)
        self.as_json: bool = as_json or (JobLog.current is not None and JobLog.current.as_json)
        handle, self.path = tempfile.mkstemp(prefix=f"pplug-{job}-", suffix=".log")
        self._file: int | None = handle
        self._temporary = self.path
        self._at_end: str | None = None
        self._moved = False
        self.keep = False
        """True: a log that never got to a run folder stays as a temporary file; else it is deleted at the end."""
        self._lock = threading.RLock()
        self._outer: JobLog | None = None
        self._streams: dict[str, Any] = {}
        self._stderr: int | None = None

    def __enter__(self) -> Self:
        self._outer, JobLog.current = JobLog.current, self
        self.write(f"--- {self.job}, {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
        for name in ("stdout", "stderr"):
            under = getattr(sys, name)
            self._streams[name] = under
            if name == "stderr" and _is_descriptor_2(under):
                under = self._take_descriptor()
            setattr(sys, name, cast(TextIO, _Stream(under, self, name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        JobLog.current = self._outer
        for name, before in self._streams.items():
            stream = getattr(sys, name)
            if isinstance(stream, _Stream):
                stream.finish()
            setattr(sys, name, before)
        if self._stderr is not None:
            os.dup2(self._stderr, 2)
        with self._lock:
            assert self._file is not None
            os.close(self._file)
            self._file = None  # threads of Ray that still write pass through
        self._leave()

    def move_to(self, folder: str, name: str = NAME) -> None:
        """Continues the log in a run folder, behind what an earlier start of the run has left there."""
        storage = Storage(folder)
        if self._moved:
            return
        self._moved = True
        if storage.is_s3:
            self._at_end = folder
            return
        place = os.path.join(os.path.abspath(storage.path), name)
        try:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            handle = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError:  # the job itself will say that it cannot write there
            self._moved = False
            return
        with self._lock:
            assert self._file is not None
            with open(self._temporary, "rb") as begun:
                os.write(handle, begun.read())
            os.close(self._file)
            self._file, self.path = handle, place
            os.unlink(self._temporary)
            if self._stderr is not None:
                os.dup2(handle, 2)

    def write(self, line: str, stream: str = "log") -> None:
        """Writes a line to the log alone. `stream`: the place where the line was printed."""
        with self._lock:
            if self._file is not None:
                text = self.object_of(line, stream) if self.as_json else f"{datetime.now(UTC):%H:%M:%S} {plain(line)}"
                os.write(self._file, f"{text}\n".encode("utf-8", "backslashreplace"))

    def object_of(self, line: str, stream: str) -> str:
        """A line as a JSON object."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        found = {"time": now, "job": self.job, "run_id": self.run_id, "stream": stream, "message": plain(line)}
        return json.dumps(found)

    def error(self, error: BaseException) -> None:
        """Writes the traceback of an error, to the log and with `debug` for the person too."""
        text = "".join(traceback.format_exception(error))
        if self.debug:
            print(text, end="", file=sys.stderr)
        else:
            for line in text.rstrip("\n").split("\n"):
                self.write(line)

    def _take_descriptor(self) -> TextIO:
        """Points descriptor 2 at the log; returns a stream to the place where it pointed before."""
        assert self._file is not None
        self._stderr = os.dup(2)
        os.dup2(self._file, 2)
        return os.fdopen(os.dup(self._stderr), "w", buffering=1, encoding="utf-8", errors="backslashreplace")

    def _leave(self) -> None:
        """Copies the log to S3, or deletes it where nobody needs it."""
        if self._stderr is not None:
            os.close(self._stderr)
        if self.path != self._temporary:
            return
        if self._at_end is not None:
            storage = Storage(self._at_end)
            try:
                before = storage.read_bytes(NAME) if storage.exists(NAME) else b""
                with open(self.path, "rb") as file:
                    storage.write_bytes(NAME, before + file.read())
            except Exception as error:  # botocore's errors, such as that nothing answers, are no OSErrors
                lost = f"{self.job}: {self.path} could not be copied to {storage.full(NAME)} ({type(error).__name__})"
                # the stream of an outer job makes the object itself
                plain_stream = self.as_json and not isinstance(sys.stderr, _Stream)
                print(self.object_of(lost, "stderr") if plain_stream else lost, file=sys.stderr)
                return
        elif self.keep:
            return
        os.unlink(self.path)

    @property
    def place(self) -> str:
        """The path or address where a person finds the log when the job has ended."""
        return self.path if self._at_end is None else Storage(self._at_end).full(NAME)


class _Stream:
    """Stands in for sys.stdout or sys.stderr: splits texts into lines, and passes on those that a person is to see.

    All else that a stream can do (fileno, isatty, encoding) is done by the one below, which is where bars are drawn.
    """

    def __init__(self, under: TextIO, log: JobLog, name: str) -> None:
        self.under, self._log, self._name, self._filter = under, log, name, Filter(log.job)
        self._begun = threading.local()  # Ray prints in a thread of its own

    def write(self, text: str) -> int:
        begun = getattr(self._begun, "text", "")
        if begun and is_bar(begun) and not text.startswith(("\r", "\n")):
            self._line(begun)
            begun = ""
        *lines, rest = (begun + text).split("\n")
        whole = has_traceback(text) and len(lines) > 1  # Ray logs a record with its traceback as one text
        for number, line in enumerate(lines):
            self._line(_last_drawn(line), hidden=whole and (number > 0 or has_traceback(line)))
        self._begun.text = _last_drawn(rest)
        return len(text)

    def flush(self) -> None:
        self.under.flush()

    def finish(self) -> None:
        """Passes on a line that was begun and not ended."""
        if begun := getattr(self._begun, "text", ""):
            self._begun.text = ""
            self._line(begun)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.under, name)

    def _line(self, line: str, hidden: bool = False) -> None:
        self._log.write(line, self._name)
        if self._log.debug:
            shown: str | None = line
        else:
            shown = None if hidden else self._filter.shown(line, self._log.run_id)
        if shown is not None and self._log.as_json:
            shown = shown if isinstance(self.under, _Stream) else self._log.object_of(shown, self._name)
        if shown is not None:
            with tqdm.external_write_mode(file=terminal(sys.stderr)):  # else the line would stand behind a bar
                _tell(self.under, shown + "\n")


def _tell(stream: Any, text: str) -> None:
    """Writes to a stream. Where nobody reads it any more, as behind `| head`, the job goes on without it."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _last_drawn(line: str) -> str:
    """The line without the earlier states of a bar, which is drawn over and over in one line."""
    *before, last = line.split("\r")
    return "".join([part for part in before if not is_bar(part)] + [last])


def show(text: str) -> None:
    """Prints lines of users' texts that the person has asked for: on stdout alone, in no log and past no filter.

    Characters that would steer a terminal are shown as escapes.
    """
    stream = terminal(sys.stdout)
    with tqdm.external_write_mode(file=terminal(sys.stderr)):
        for line in text.split("\n"):
            said = "".join(char if char.isprintable() or char == "\t" else ascii(char)[1:-1] for char in line)
            encoding = getattr(stream, "encoding", None) or "utf-8"
            _tell(stream, said.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def terminal(stream: TextIO) -> TextIO:
    """The stream below those of jobs: a bar is drawn there, since it is no line for a log."""
    while isinstance(stream, _Stream):
        stream = stream.under
    return stream


def _is_descriptor_2(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 2
    except (AttributeError, OSError, io.UnsupportedOperation):
        return False
