"""Keys of the jobs that keep tables in order."""

from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from pipelines.job_config import JobConfig
from pplug.llm import LLMConfig
from pplug.settings import Settings


class CompactConfig(JobConfig):
    """Job `compact`: merges the small files of many nights, sorted by user, and changes no row.

    Embeddings lose the vectors whose item has vanished from the histories. The job works beside readers and writers: a
    table that another job commits to meanwhile is planned again, and a table whose newest run has not ended is left as
    it is. The old files stay in the folder until a vacuum. Unit of work: a file that the tables hold.
    """

    names: tuple[str, ...] | None = None
    """Tables to compact; all when not given."""
    target_mb: int = Field(128, gt=0)
    """Size in MB from which files stay as they are; smaller files of a bucket are merged up to it."""
    wave_files: int = Field(1000, gt=0)
    """Number of old files that one commit replaces."""


class VacuumConfig(JobConfig):
    """Job `vacuum`: deletes files that no version within the retention names, and none that a job may still need.

    The newest complete version and all younger than the retention stay readable. Files that a killed run has left are
    deleted when they are older than it. Unit of work: a file that the newest version does not name.
    """

    names: tuple[str, ...] | None = None
    """Tables to vacuum; all when not given."""
    retention_hours: float = Field(168.0, ge=1)
    """Age in hours up to which versions and files stay. The longest job and the oldest reader must take less."""


class RestoreConfig(JobConfig):
    """Job `restore`: takes tables of a population back to an earlier complete version, as a new version on top.

    `restore histories --version 12` takes back one table. `restore --before RUN` takes back every table that the run
    wrote, to the state before the run began; one that began with that run stays as it is, and is named. The rows of
    later runs in these tables are taken back, too: those runs are named, and need a new run_id to write them again.
    The retention of `vacuum` limits how far back a table can go, and so do the last `erase`, `migrate` and
    `rebucket`. Tables that are made from the restored ones follow with their next run: after histories come back, run
    `refresh`. No other job may write meanwhile; readers keep the files that they have opened. Unit of work: a table.
    """

    positional: ClassVar[str] = "names"
    """Name of the key whose value may follow the job directly."""

    names: tuple[str, ...] | None = Field(None, min_length=1)
    """Tables to restore, such as histories,requests. With `before` the default is every table that the run wrote."""
    version: NonNegativeInt | None = None
    """Number of the version to go back to, for one table. It must be complete: a run ended with it."""
    before: str | None = None
    """Id of a run: each table goes back to its newest complete version from before that run's first commit."""

    @model_validator(mode="after")
    def _a_state_is_named(self) -> Self:
        if (self.version is None) == (self.before is None):
            raise ValueError("say how far back: either version, for one table, or before, with a run_id")
        if self.version is not None and (self.names is None or len(self.names) != 1):
            raise ValueError("version is a number of one table: name that table; several tables go back by before")
        return self


class DropRunConfig(JobConfig):
    """Job `drop-run`: takes the replies of runs out of `generations`, by name or by age.

    The newest version then holds those of all other runs; older versions keep the replies until a vacuum. A run of
    `generate` or `judge` whose replies were dropped makes them again when it is started again with its run_id. No user
    is forgotten by it: that is what `erase` does. Unit of work: a reply.
    """

    positional: ClassVar[str] = "runs"
    """Name of the key whose value may follow the job directly."""

    runs: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the runs."""
    older_than_days: float | None = Field(None, gt=0)
    """Drops the replies of each run whose last commit is older than that many days."""

    @model_validator(mode="after")
    def _runs_are_named(self) -> Self:
        if (self.runs is None) == (self.older_than_days is None):
            raise ValueError("say which runs: either runs, by name, or older_than_days")
        return self


class DropRequestsConfig(JobConfig):
    """Job `drop-requests`: takes requests that nobody needs any more out of `requests`, and all replies to them.

    They go by their age or because runs have answered them. Replies of every run to a dropped request go with it, since
    they could be neither evaluated nor judged without it. A request with a history of its own (one per question)
    stays, because it alone tells whose that history is. Older versions of both tables keep the rows until a vacuum. A
    source that still holds a dropped request brings it back when it is ingested again. A `generate` that is at work
    stops at its next commit, and its rerun answers the requests that are left. If the job is interrupted, the same
    command ends its work. Unit of work: a request.
    """

    older_than_days: float | None = Field(None, gt=0)
    """Drops the requests whose time (as_of) lies more than that many days back. Requests without a time stay."""
    answered_by: tuple[str, ...] | None = Field(None, min_length=1)
    """Drops the requests to which one of these runs has a reply that is no error; a reply to an earlier input or time
    does not count."""

    @model_validator(mode="after")
    def _requests_are_named(self) -> Self:
        if (self.older_than_days is None) == (self.answered_by is None):
            raise ValueError("say which requests: either older_than_days, or answered_by with the names of runs")
        return self


class EraseConfig(JobConfig):
    """Job `erase`: removes users from all tables, old versions, run folders and exports, and proves it.

    Route: ids -> all values of the users' own, from all existing files -> run folders and exports without them -> each
    table's files without their rows -> old files, versions and log entries deleted -> every file left opened and
    searched. No other job may work meanwhile, and readers of older versions are stopped. If the job is interrupted, the
    same command ends its work. The record (report.json) holds counts and hashes. Unit of work: a user.
    """

    user_id: str | None = None
    """Id of one user. A command line may be logged: a file of users keeps the id out of it."""
    users: str | None = None
    """File with one user id per line. It is left as it is, also in one of the folders: remove it afterwards."""
    folders: tuple[str, ...] = ("runs",)
    """Run folders and exports. All files below them are rewritten without the users, and searched. A folder that is
    named here and is not there ends the job before anything is erased; `--folders ''` names none. Other tables below
    them stay as they are: if they hold the users, the job names them and ends with exit code 1."""
    confirm_absent: bool = False
    """Confirms ids that are in no table, for example of people who never had a row. Without it, such an id ends the job
    with exit code 1 after all others are erased, because it may be misspelled and its user still here."""
    run_id: str | None = None
    """Name of this run. Give the name of an erase that broke off, to end it."""

    @model_validator(mode="after")
    def _somebody_is_named(self) -> Self:
        if (self.user_id is None) == (self.users is None):
            raise ValueError("name one user by user_id, or a file of them by users")
        if self.user_id is not None and not self.user_id.strip():
            raise ValueError("user_id is empty, and no user has such an id; was a variable in the command not set?")
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
    """True only prints which tables would be migrated, from which schema version to which; nothing is written."""


class RebucketConfig(JobConfig):
    """Job `rebucket`: gives all tables of a population more buckets, as when a pilot has grown.

    A bucket is what a task reads at a time, and the number is fixed when the tables are made. No row changes. All
    tables are looked at before the first one changes; their rows are then written as files of the new buckets, and at
    the end one commit per table puts these in place of the old ones. If the job is interrupted before that, the tables
    are as they were. If it is interrupted between these commits, jobs refuse the tables until the same command has
    ended it. Versions of before can be neither read nor restored by these jobs, and the next `refresh` compares all
    histories once, but encodes nothing again. The job works alone on the tables. The old files stay until a vacuum: the
    disk must hold the tables twice. Unit of work: a table.
    """

    buckets: int = Field(gt=1, le=65_536)
    """New number of buckets, a multiple of the present one; 128 MB of vectors or items per bucket are a good size."""


class ExportConfig(JobConfig):
    """Job `export`: a table -> a folder of plain Parquet; or one user's adapter -> a PEFT folder.

        export personas --tables TABLES --output FOLDER
        export --user-id ID --tables TABLES --llm.model BASE --output FOLDER

    Parquet: the newest complete version in files that pandas, DuckDB, Polars and Spark read, with vectors as fixed-size
    lists. The folder is complete when `_SUCCESS` is in it, and is never written to again; run a killed export again to
    end it. Unit of work: a row of the table.
    Adapter: a folder that `peft.PeftModel.from_pretrained` and vLLM load. It holds weights and settings alone, no text
    and no user's name. Unit of work: a user.
    """

    positional: ClassVar[str] = "table"
    """Name of the key whose value may follow the job directly."""

    table: str = "personas"
    """Name of the table to export, for example personas, histories or generations."""
    user_id: str | None = None
    """Id of the user whose adapter is exported, as a PEFT folder; no table is exported then."""
    llm: LLMConfig | None = None
    """Model that the adapter of `user_id` was trained on, with its prompt layout."""
    output: str
    """New folder or s3:// prefix to write to."""
    format: Literal["parquet"] = "parquet"
    """Format of an exported table; an adapter is always safetensors."""
    as_of_version: int | None = Field(None, ge=0)
    """Version of the table to export, instead of the newest complete one. Any works until `vacuum` removes it."""

    @model_validator(mode="after")
    def _adapter_or_table(self) -> Self:
        if (self.user_id is None) != (self.llm is None):
            raise ValueError("user_id and llm belong together: an adapter is exported for the base it was trained on")
        if self.user_id is not None and ("table" in self.model_fields_set or self.as_of_version is not None):
            raise ValueError("with user_id an adapter of the newest version is exported: leave table and version out")
        return self


class PublishConfig(Settings):
    """Job `publish`: a folder with a plug, an LLM or an encoder -> an address that every node can fetch it from.

        publish FOLDER --to s3://BUCKET/PREFIX

    `train`, `adapt` and `base-lm` publish what they make; this is for models that come from elsewhere. The files keep
    their names, and a manifest that is written last names each with its size and digest: nobody reads half of a model.
    Give the address as `plug`, `llm.model` or `encoder.model`. Unit of work: a file.
    """

    positional: ClassVar[str] = "folder"
    """Name of the key whose value may follow the job directly."""

    folder: str
    """Folder of this machine to publish."""
    to: str
    """Address of its own, such as s3://bucket/models/llm. Files that were published there before are replaced."""
    run_id: str | None = None
    """Name of this run; default: a new one."""
    run_dir: str | None = None
    """Folder of the run's report; default: runs/<run_id>."""


class ImportAdapterConfig(JobConfig):
    """Job `import-adapter`: a LoRA that was trained elsewhere -> one user's row in the table of adapters.

        import-adapter FOLDER --user-id ID --tables TABLES --llm.model BASE

    The folder is one that PEFT has saved, with weights as safetensors, and holds a plain LoRA or an rsLoRA. DoRA,
    modules_to_save and other kinds are refused by name, and so is an adapter that changes nothing of the base. The row
    takes the place of the user's former adapter. All items that the user has now count as known to it: requests that
    may not see one of them are answered without it. `adapt` replaces it where it is asked for this user. Unit of work:
    a user.
    """

    positional: ClassVar[str] = "folder"
    """Name of the key whose value may follow the job directly."""

    folder: str
    """PEFT folder, or the address of one, with adapter_config.json and adapter_model.safetensors."""
    user_id: str
    """Id of the user whom the adapter is for."""
    llm: LLMConfig
    """Model that the adapter stands on, with its prompt layout."""


class ShowConfig(Settings):
    """Job `show`: rows of a table -> text on the screen, to see what stands there.

        show --tables TABLES
        show rejects --tables TABLES
        show replies --tables TABLES --user-id ID

    Without a name it lists the tables with their rows and versions. `replies` shows requests with their inputs, targets
    and the reply of each method. The rows are those of the newest complete version, or of the newest one where none is
    complete. The texts are on the screen alone: no log and no report holds them. Unit of work: a row.
    """

    positional: ClassVar[str] = "table"
    """Name of the key whose value may follow the job directly."""

    tables: str
    """Folder or s3:// prefix of the population's tables."""
    table: str | None = None
    """Table to show: replies, rejects, histories, requests, personas, profiles, adapters, generations or embeddings."""
    user_id: str | None = None
    """Id of the user whose rows are shown; not for rejects, which belong to a row of a source."""
    bucket: NonNegativeInt | None = None
    """Number of the bucket whose rows are shown."""
    run: str | None = None
    """Id of the run whose rows are shown, for replies, generations and rejects."""
    rows: int = Field(5, gt=0, le=10_000)
    """Number of rows, or of requests with their replies."""

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.user_id is not None and self.bucket is not None:
            raise ValueError("give user_id or bucket: a user's rows stand in one bucket")
        return self
