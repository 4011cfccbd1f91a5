"""Keys of the jobs that keep tables in order."""

from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from pipelines.options import JobConfig
from pplug.llm import LLMConfig


class CompactConfig(JobConfig):
    """Job `compact`: the small files of many nights become few, sorted by user, and no row changes.

    Of embeddings, the vectors whose item has vanished from the histories go. Works beside readers and writers: a table
    that somebody commits to meanwhile is planned again, one whose newest run has not ended is left as it is. The old
    files lie there until a vacuum. Unit of work: a file that the tables hold.
    """

    names: tuple[str, ...] | None = None
    """Tables to compact; all when not given."""
    target_mb: int = Field(128, gt=0)
    """Files of this size stay as they are; smaller ones of a bucket are put together up to it."""
    wave_files: int = Field(1000, gt=0)
    """Old files whose replacement is one commit."""


class VacuumConfig(JobConfig):
    """Job `vacuum`: deletes files that no version within the retention names; what readers and running jobs need stays.

    The newest complete version and all younger than the retention stay readable, and files that a killed run has left
    go when they are older than it. Unit of work: a file that the newest version does not name.
    """

    names: tuple[str, ...] | None = None
    """Tables to vacuum; all when not given."""
    retention_hours: float = Field(168.0, ge=1)
    """Versions and files younger than this stay: more than the longest job and the oldest reader take."""


class RestoreConfig(JobConfig):
    """Job `restore`: takes tables of a population back to an earlier complete version, as a new version on top.

    `restore histories --version 12` takes back one table; `restore --before RUN` every table that the run wrote, to the
    state before the run began. What later runs have written to these tables is taken back too: those runs are named,
    and to write it again they need a new run_id. How far back it goes is decided by the retention of `vacuum`, and no
    further than the last `erase`. Tables that are made from the restored ones follow with their next run: after
    histories come back, run `refresh`. Nobody else may write meanwhile; readers go on with what they have opened. Unit
    of work: a table.
    """

    positional: ClassVar[str] = "names"
    """The key that may stand without its name, right after the job."""

    names: tuple[str, ...] | None = Field(None, min_length=1)
    """Tables to restore, such as histories,requests. With `before` the default is every table that the run wrote."""
    version: NonNegativeInt | None = None
    """The version to go back to, for one table. It must be complete: a run ended with it."""
    before: str | None = None
    """The run_id of a run: each table goes back to its newest complete version from before that run's first commit."""

    @model_validator(mode="after")
    def _a_state_is_named(self) -> Self:
        if (self.version is None) == (self.before is None):
            raise ValueError("say how far back: either version, for one table, or before, with a run_id")
        if self.version is not None and (self.names is None or len(self.names) != 1):
            raise ValueError("version is a number of one table: name that table; several go back together by before")
        return self


class EraseConfig(JobConfig):
    """Job `erase`: some users are gone from every table, old version, run folder and export; the proof opens what is
    left.

    Route: ids -> all the users' own values, from all files that lie there -> run folders and exports without them ->
    each table's files without their rows -> old files, versions and log entries away -> every file left opened and
    searched. Nobody else may write meanwhile; readers of older versions are stopped. Interrupted, the same command ends
    the work. The record (report.json) holds counts and hashes. Unit of work: a user.
    """

    user_id: str | None = None
    """One user; a command line may be logged, so that a file of users is the quieter way."""
    users: str | None = None
    """File with a user id a line."""
    folders: tuple[str, ...] = ("runs",)
    """Run folders and exports: all below them is rewritten without the users, and searched."""
    confirm_absent: bool = False
    """Confirms that ids which are in no table are right, for example of people who never had a row. Without it, such an
    id ends the job with exit code 1 after all others are erased: it may be misspelled, and its user still here."""
    run_id: str | None = None
    """Give the id of an erase that broke off, to end it."""

    @model_validator(mode="after")
    def _somebody_is_named(self) -> Self:
        if (self.user_id is None) == (self.users is None):
            raise ValueError("name one user by user_id, or a file of them by users")
        return self


class MigrateConfig(JobConfig):
    """Job `migrate`: brings the tables of a population to the schema versions that this release reads.

    Each table has a schema version of its own. A release that raises one refuses the older table until it is migrated,
    and its entry in CHANGELOG.md says so. All tables are checked before the first one changes. Each is then rewritten
    bucket by bucket, and one commit puts the new files, columns and version in place of the old ones. If the job is
    interrupted, the same command goes on with the tables that are not migrated yet. Earlier versions of a migrated
    table can be read and restored only by the earlier release. No other job may write meanwhile. Unit of work: a table.
    """

    names: tuple[str, ...] | None = None
    """Tables to migrate, such as profiles,adapters; all when not given."""
    dry_run: bool = False
    """Only print which tables would be migrated, from which schema version to which; nothing is written."""


class ExportConfig(JobConfig):
    """Job `export`: a table -> a folder of plain Parquet; or one user's adapter -> a PEFT folder.

        export personas --tables TABLES --output FOLDER
        export --user-id ID --tables TABLES --llm.model BASE --output FOLDER

    Parquet: the newest complete version, as pandas, DuckDB, Polars and Spark read it: one row a user, vectors as
    fixed-size lists. The folder is complete when `_SUCCESS` is in it, and is never written to again; a killed export is
    ended by running it again. Unit of work: a row of the table.
    Adapter: what `peft.PeftModel.from_pretrained` and vLLM load; the folder holds weights and settings alone, no text
    and no name of anybody. Unit of work: a user.
    """

    positional: ClassVar[str] = "table"
    """The key that may stand without its name, right after the job."""

    table: str = "personas"
    """Its name, e.g. personas, histories, generations."""
    user_id: str | None = None
    """Whose adapter; a PEFT folder of it is written, no table."""
    llm: LLMConfig | None = None
    """With user_id: the base the adapter was trained on, with its prompt layout."""
    output: str
    """New folder or s3:// prefix; a folder for an adapter."""
    format: Literal["parquet"] = "parquet"
    """Format of an exported table; an adapter is always safetensors."""
    as_of_version: int | None = Field(None, ge=0)
    """An old version of the table, complete or not, as long as a vacuum has left it; the newest complete by default."""

    @model_validator(mode="after")
    def _adapter_or_table(self) -> Self:
        if (self.user_id is None) != (self.llm is None):
            raise ValueError("user_id and llm belong together: an adapter is exported for the base it was trained on")
        if self.user_id is not None and ("table" in self.model_fields_set or self.as_of_version is not None):
            raise ValueError("with user_id an adapter is exported, of the newest version: leave table and version out")
        return self
