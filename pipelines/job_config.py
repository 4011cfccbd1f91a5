"""The keys that most jobs share."""

from datetime import UTC, date, datetime
from typing import Literal, Self

from pydantic import Field, model_validator

from pplug.settings import Settings

RequestChoice = Literal["all", "open", "labelled", "new"]
"""Requests that a job works for: `asked.Chosen` tells them."""


def as_moment(value: object) -> object:
    """Reads the value of a key that is a point in time; a day is its begin, and a time without a zone is UTC.

    Raises:
        ValueError: it is neither; a number could be meant in several ways.
    """
    if value is None:
        return None
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value.strip())
    except ValueError:
        pass
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        raise ValueError("expected a day or a time in ISO form, such as 2026-11-20 or 2026-11-20T06:00+01:00")
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


_MIN = "min_"
"""Begin of the keys with the least number of a pool's actors."""


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

    def least(self, name: str) -> int:
        """Least number of a pool's actors, whose most is the key `name`: the key min_<name>, or else the most."""
        least: int = getattr(self, _MIN + name, None) or getattr(self, name)
        return least

    @model_validator(mode="after")
    def _least_is_no_more_than_most(self) -> Self:
        for name in type(self).model_fields:
            if _MIN + name in type(self).model_fields and self.least(name) > getattr(self, name):
                raise ValueError(f"{_MIN}{name}={self.least(name)} is more than {name}={getattr(self, name)}; lower it")
        return self
