"""The keys that most jobs share."""

from pydantic import Field

from pplug.settings import Settings


class JobConfig(Settings):
    """What a job on a population's tables is told, whatever it does. `describe` shows its own keys before these."""

    tables: str
    """Folder or s3:// prefix of the population's tables."""
    run_id: str | None = None
    """Name of this run; a new one when not given."""
    run_dir: str | None = None
    """Default: runs/<run_id>."""


class ResumableConfig(JobConfig):
    """What a job is told that a rerun goes on with, and that sets aside what it cannot use."""

    max_reject_fraction: float = Field(0.1, ge=0, le=1)
    run_id: str | None = None
    """Give the id of a run that broke off to go on with it."""
