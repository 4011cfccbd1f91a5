"""The base of all configs: frozen, unknown keys refused, and keys that have been renamed.

A key's old name works for one release, with a warning that names the new one. Identities and records of runs keep the
old name for good: they were computed with it, and stored tables and adapters are found by them.
"""

import json
import logging
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

log = logging.getLogger(__name__)
_warned: set[tuple[str, str]] = set()
_ADDED = "added"


def renamed(old: str, default: Any, **bounds: Any) -> Any:
    """A field that had the name `old` before, with pydantic's bounds such as `gt=0`."""
    return Field(default, serialization_alias=old, **bounds)


def added(default: Any, **bounds: Any) -> Any:
    """A field that came later, with pydantic's bounds: at its default it is left out of identities, which then stay."""
    return Field(default, json_schema_extra={_ADDED: True}, **bounds)


class Settings(BaseModel):
    """A config. Fields made by `renamed` take their old name too."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def renames(cls) -> dict[str, str]:
        """Old name -> name of each renamed field."""
        fields = cls.model_fields.items()
        return {info.serialization_alias: name for name, info in fields if info.serialization_alias is not None}

    def decisive(self, **choice: Any) -> dict[str, Any]:
        """The values as JSON under the names that identities are computed with, without `added` ones at their default.

        Args:
            choice: `include` or `exclude`, as for `model_dump`, by the fields' present names.
        """
        return self._without_defaults(self.model_dump(mode="json", by_alias=True, **choice))

    def _without_defaults(self, values: dict[str, Any]) -> dict[str, Any]:
        """Takes the `added` fields at their default out of the dumped values, at any depth."""
        for name, info in type(self).model_fields.items():
            key, value, extra = info.serialization_alias or name, getattr(self, name), info.json_schema_extra
            if isinstance(extra, dict) and extra.get(_ADDED) and value == info.get_default():
                values.pop(key, None)
            elif isinstance(value, Settings) and isinstance(values.get(key), dict):
                values[key] = value._without_defaults(values[key])
        return values

    @model_validator(mode="before")
    @classmethod
    def _take_old_names(cls, values: Any) -> Any:
        renames = cls.renames()
        if not isinstance(values, dict) or renames.keys().isdisjoint(values):
            return values
        taken = {}
        for key, value in values.items():
            if key not in renames:
                taken[key] = value
                continue
            name = renames[key]
            if name in values:
                raise ValueError(f"{key} and {name} are two names of one key; give {name}, the new one, alone")
            warn_renamed(key, name)
            taken[name] = value
        return taken


def warn_renamed(old: str, new: str) -> None:
    """Warns that a key was given by its old name, once per key and process."""
    if (old, new) not in _warned:
        _warned.add((old, new))
        log.warning("the key %s is now called %s; the old name works for one more release", old, new)


def underscored(flag: str, known: Any = None) -> str:
    """The key of a flag without its dashes: hyphens stand for underscores, but in names that `known`, the nested values
    of a config file, has with them, such as those of models."""
    parts = list[str]()
    for part in flag.split("."):
        own = isinstance(known, dict) and part in known
        parts.append(part if own else part.replace("-", "_"))
        known = known.get(parts[-1]) if isinstance(known, dict) else None
    return ".".join(parts)


def as_words(key: str, value: Any) -> list[str]:
    """The words of a command line that give a key this value: a text, or a mapping or list as JSON."""
    if not isinstance(value, str):
        return ["--set", f"{key}={json.dumps(value, ensure_ascii=False)}"]
    return [f"--{key}={value}"] if value.startswith("-") else [f"--{key}", value]
