"""Folders of plugs and models that a job reads or writes, on this machine or at an address such as s3://bucket/plug."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from infra import artifacts
from infra.errors import InputError
from infra.report import RunReport
from infra.storage import Storage
from pplug.folder import RUN_FILES, check_replaceable, whole_folder
from pplug.plug import PlugConfig, plug_id

T = TypeVar("T")


@contextmanager
def loading(key: str) -> Iterator[None]:
    """Loads a model of a config's key in the block, in a worker, where another try would end alike.

    Raises:
        InputError: the model cannot be loaded, or is another one than at the job's start.
    """
    try:
        yield
    except (ValueError, ImportError) as error:
        raise InputError(f"{key}: {error}") from error


def below(run_dir: str, name: str) -> str:
    """Folder or address of this name in a run's folder."""
    return f"{run_dir.rstrip('/')}/{name}" if artifacts.is_address(run_dir) else os.path.join(run_dir, name)


def check_output(key: str, where: str | Path, known: Sequence[str], run_dir: str | None = None) -> None:
    """Refuses a place that `whole_output` could not write to; a job asks before it trains.

    Args:
        key: the config's name for the place.
        known: patterns of the names that such a folder may hold.
        run_dir: the run's folder, of a job that keeps its examples and checkpoints there.

    Raises:
        InputError: something else lies there or will, or the address is one that is only read.
    """
    where = str(where)
    try:
        if run_dir is not None and _same(where, run_dir):
            raise InputError(f"{where} is the run's own folder, which holds the training's files; give another folder")
        if where.startswith("file://"):
            raise InputError(f"{where}: give the path alone")
        if Storage(where).is_s3:
            artifacts.check_publishable(where, (*known, *RUN_FILES))
        else:
            check_replaceable(where, known)
    except (ValueError, InputError) as error:
        raise InputError(f"{key}: {error}") from error


def _same(one: str, other: str) -> bool:
    if artifacts.is_address(one) or artifacts.is_address(other):
        return one.rstrip("/") == other.rstrip("/")
    return os.path.realpath(one) == os.path.realpath(other)


@contextmanager
def whole_output(where: str | Path, known: Sequence[str]) -> Iterator[Path]:
    """Yields an empty folder of this machine, whose files take the place of those at `where` when the block ends.

    Raises:
        ValueError: `pplug.folder.whole_folder`.
    """
    where = str(where)
    with artifacts.published(where) if artifacts.is_address(where) else whole_folder(where, known) as draft:
        yield draft


def load_plug(where: str, expected: str, load: Callable[[Path], T]) -> T:
    """Returns what `load` makes of the plug's folder on this machine, if it is the plug that the job was started with.

    The identity is read after the loading: a plug that took the other's place in between would go by its name.

    Raises:
        InputError: it is another one.
    """
    folder = artifacts.fetch(where)
    loaded = load(folder)
    if (found := plug_id(folder)) != expected:
        raise InputError(
            f"plug {where}: {found} on this machine, and {expected} where the job was started: it was replaced "
            "meanwhile, or another one lies there; run the job again"
        )
    return loaded


def note_other_history(report: RunReport, plug: str, made_for: PlugConfig, max_history_items: int) -> None:
    """Warns where personas are made from another number of items than the training read: the plug has not learned to
    weigh so many."""
    trained = made_for.max_history_items
    if max_history_items == trained:
        return
    if trained == PlugConfig.model_fields["max_history_items"].default:  # which no plug's folder says
        words = (
            f"names no number of items: it was trained on the newest {trained} of a user, or by an earlier release, "
            f"which noted none; max_history_items={max_history_items} is right if its training had that"
        )
    else:
        words = (
            f"was trained on the newest {trained} items of a user, and max_history_items={max_history_items} makes "
            f"personas from another number; set max_history_items={trained}"
        )
    report.warn(f"plug {plug} {words}")
