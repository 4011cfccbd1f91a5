"""Buckets that are made anew as a whole, and replaced wave by wave."""

from dataclasses import dataclass, field

from infra.report import RunReport
from infra.table import DataFile, Table
from pipelines.waves import commit_first, next_group


@dataclass
class Replacer:
    """Driver side: collects whole buckets made anew, replaces them wave by wave; readers see the last commit only."""

    table: Table
    report: RunReport
    wave_rows: int
    metadata: dict[str, str]
    planned_on: int
    replaced: int = 0
    """Buckets so far."""
    _files: list[DataFile] = field(default_factory=list)
    _buckets: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._group = next_group(self.table, self.report.run_id)

    def add(self, bucket: int, file: DataFile | None) -> None:
        """Takes a bucket's new file, or that nothing is left of it."""
        self._buckets.append(bucket)
        self._files += [file] if file is not None else []
        self.replaced += 1
        if sum(file.rows for file in self._files) >= self.wave_rows:
            self.flush()

    def flush(self, complete: bool = False) -> None:
        """Commits what has come; `complete` marks the version that readers take."""
        commit = commit_first(
            self.table,
            self._files,
            run_id=self.report.run_id,
            group=self._group,
            mode="replace" if self._buckets else "append",
            buckets=self._buckets,
            planned_on=self.planned_on,
            metadata=self.metadata,
            complete=complete,
            strict=True,
        )
        self._group, self.planned_on, self._files, self._buckets = self._group + 1, commit.version, [], []
        self.report.table_written(self.table.spec.name, commit.version)
