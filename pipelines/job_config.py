"""The keys that most jobs share."""

from pydantic import Field

from pplug.settings import Settings


class JobConfig(Settings):
    """Keys of a job on a population's tables. `describe` shows a job's own keys before these."""

    tables: str
    """Folder or s3:// prefix of the population's tables."""
    run_id: str | None = None
    """Name of this run; default: a new one."""
    run_dir: str | None = None
    """Folder of the run's report and files; default: runs/<run_id>."""


class ResumableConfig(JobConfig):
    """Keys of a job that a rerun goes on with, and that sets aside rows it cannot use."""

    max_reject_fraction: float = Field(0.1, ge=0, le=1)
    """More rejects than this fraction of the rows end the run with exit code 3."""
    run_id: str | None = None
    """Name of this run; default: a new one. Give the id of a run that broke off to go on with it."""
