"""Record of what a base model has learned from: `made_from.json` in its folder.

`adapt --stage base` and `base-lm` write it. `generate` reads it: a base that has learned the answers of a population's
requests must not be scored on them.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from infra.errors import InputError
from infra.snapshot import Snapshot
from infra.storage import Storage
from pipelines.owners import Owners
from pipelines.tables import snapshot
from pplug.identity import short_id

FILE = "made_from.json"


class MadeFrom(BaseModel):
    """One training of a base model. No text and no user id stands in it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    job: str
    run_id: str
    tables: str
    """Address of the population's tables."""
    versions: dict[str, int]
    """Versions of the tables that were read."""
    examples: Literal["items", "requests"]
    cut: Literal["requests", "none"]
    """requests: nothing was learned that a request of its user may not see; none: answers may have been learned."""
    users_left_out: int = 0
    """Users of whom nothing was read."""
    left_out: str | None = None
    """Fingerprint of the ids of the users left out (`users_id`)."""
    items_cut_off: int = 0
    """Items that a request of their user may not see."""
    latest_item_at: str | None = None
    """Time of the newest item learned from; None where no item has a time."""


def users_id(users: Iterable[str] | None) -> str | None:
    """Fingerprint of a set of user ids; None for no set or an empty one."""
    names = sorted(users or ())
    return short_id({"users": names}) if names else None


def with_all_histories(users: Iterable[str] | None, requests: Snapshot | None) -> frozenset[str] | None:
    """A set of users with all other histories of their persons, as the requests tell them; None for none."""
    if users is None or requests is None:
        return None if users is None else frozenset(users)
    return Owners(requests).with_all_histories(users)


def read(model: str | Path) -> list[MadeFrom]:
    """Trainings of a model folder, the newest first; none for a model that our jobs did not make.

    Raises:
        InputError: the record cannot be read.
    """
    path = Path(model) / FILE
    if not path.is_file():
        return []
    try:
        return [MadeFrom.model_validate(one) for one in json.loads(path.read_text(encoding="utf-8"))["trainings"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a record of trainings ({type(error).__name__}); make the model anew") from error


def text(newest: MadeFrom, base: str | Path | None = None) -> str:
    """Content of the record: this training, then those of the base that it went on from."""
    trainings = [newest, *(read(base) if base is not None else [])]
    return json.dumps({"trainings": [one.model_dump(mode="json") for one in trainings]}, indent=2) + "\n"


def _named(users: Iterable[str] | None, one: MadeFrom, tables: str, requests: Snapshot) -> set[str | None]:
    """Fingerprints of the users asked with all histories of their persons, by the requests of now, and by those that
    the training has seen where they can still be read: later ones name histories that it cannot have learned from."""
    found = {users_id(with_all_histories(users, requests))}
    if "requests" in one.versions:
        try:
            then = snapshot(tables, "requests", {"requests": one.versions["requests"]})
            found.add(users_id(with_all_histories(users, then)))
        except InputError:  # a vacuum has taken that version
            pass
    return found


def check(
    model: Path, tables: str, requests: "Snapshot", users: frozenset[str] | None, dated: int, with_target: int
) -> list[str]:
    """Refuses a base that has learned answers of the requests asked; returns warnings about what cannot be told.

    Args:
        users: users whose requests are asked; None for all.
        dated: number of requests asked that have a known answer and see only a part of their user's history.
        with_target: number of requests asked that have a known answer.

    Raises:
        InputError: the base learned from these tables without a cut, and not all of these users were left out.
    """
    warnings = []
    for one in read(model) if with_target else []:
        concerned = with_target if one.examples == "requests" else dated
        if not concerned or Storage(one.tables).uri != Storage(tables).uri:
            continue
        by = f"the base {model} was made by {one.job} (run {one.run_id})"
        if one.cut == "none" and (one.left_out is None or one.left_out not in _named(users, one, tables, requests)):
            raise InputError(
                f"{by} from {one.examples} of {tables} without a cut, and may know the answers of {concerned} of the "
                "requests; give a base made from other people's tables or with cut=requests, ask with --users for "
                "exactly the users that its training left out, or ask for --requests open"
            )
        version = one.versions.get("requests")
        if one.cut == "requests" and version != requests.version:
            warnings.append(
                f"{by}, cut at the requests of version {version}; the requests now are of version "
                f"{requests.version}: where later ones ask about items that it learned, it knows their answers"
            )
    return warnings
