"""Folders of models: written whole or not at all, and read whole.

Route: draft folder beside the target -> files and folders flushed to the disk -> one rename that exchanges the two.
A reader that opens the target's path finds the old folder or the new one, never a folder with files of both. Where the
file system cannot exchange two folders (NFS), two renames do, and between them there is no folder for an instant.
A reader that opens several files, one after the other, may still open some before the exchange and some after it:
`read_whole` notices that and reads again. Other readers (vLLM, transformers) do not: give them a folder of its own.
"""

import ctypes
import errno
import fnmatch
import glob
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "chat_template*",
    "additional_chat_templates", "*processor_config.json", "*.py", "training.json", "made_from.json",
)  # fmt: skip
"""Names that a model folder may hold, as transformers and our jobs write it."""
RUN_FILES = ("job.log", "line.log", "report.json")
"""Names that a run leaves in its folder; where that is the model's folder too, they move on into the new one."""
_ABANDONED_S = 86_400.0
"""Age after which a draft of another machine belongs to a writer that was killed."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_READS = 20
_drafts: set[Path] = set()
"""Drafts that this process is writing."""


def check_replaceable(target: str | Path, known: Sequence[str]) -> None:
    """Refuses a target that `whole_folder` could not replace, or only with a loss; a job asks before it trains.

    Args:
        known: patterns of the names that such a folder may hold.

    Raises:
        ValueError: the target is a file, a mount point, or a folder that holds something else.
    """
    target = Path(os.path.realpath(target))
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is no folder; give another path")
    if target.is_mount():
        raise ValueError(f"{target} is a mount point, which cannot be replaced; give a folder below it")
    kept = (*known, *RUN_FILES, ".nfs*")
    strange = sorted(name for name in os.listdir(target) if not any(fnmatch.fnmatch(name, one) for one in kept))
    if strange:
        raise ValueError(
            f"{target} holds {strange[0]} ({len(strange)} such in all), which would be lost when the folder is "
            f"replaced: only {', '.join(known)} belong there; give another folder, or move that away"
        )


@contextmanager
def whole_folder(target: str | Path, known: Sequence[str]) -> Iterator[Path]:
    """Yields an empty draft folder, which takes the target's place when the block ends without an error.

    A killed writer leaves its draft beside the target; the next writer of this target removes it.

    Args:
        known: patterns of the names that such a folder may hold; an existing target with others is refused.

    Raises:
        ValueError: see `check_replaceable`.
    """
    target = Path(os.path.realpath(target))
    check_replaceable(target, known)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    draft = target.with_name(f".{target.name}~{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex[:8]}.draft")
    draft.mkdir()
    _drafts.add(draft)
    try:
        yield draft
        _flush(draft)
        check_replaceable(target, known)  # hours may have passed
        _put(draft, target)
        _flush_one(target.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        _drafts.discard(draft)


def _put(draft: Path, target: Path) -> None:
    """The draft becomes the target; what was there becomes the draft."""
    if not target.exists():
        os.rename(draft, target)
    elif not _exchange(draft, target):
        old = draft.with_name(f"{draft.name.removesuffix('.draft')}-old.draft")
        os.rename(target, old)
        os.rename(draft, target)
        os.rename(old, draft)
    for name in RUN_FILES:  # a log that is being written keeps its file
        if (draft / name).exists() and not (target / name).exists():
            os.rename(draft / name, target / name)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step; False where kernel, C library or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _flush(folder: Path) -> None:
    """All files and folders below reach the disk before a name points to them."""
    for place, _, files in os.walk(folder):
        for name in files:
            _flush_one(Path(place, name))
        _flush_one(Path(place))


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(target: Path) -> None:
    """Removes drafts of writers that were killed."""
    for path in target.parent.glob(f".{glob.escape(target.name)}~*.draft"):
        host, pid, _ = path.name.removeprefix(f".{target.name}~").rsplit("~", 2)
        if host != socket.gethostname():
            dead = time.time() - path.stat().st_mtime > _ABANDONED_S
        elif int(pid) == os.getpid():  # in containers a new process often has the number of the killed one
            dead = path not in _drafts
        else:
            dead = not Path(f"/proc/{pid}").exists()
        if dead:
            shutil.rmtree(path, ignore_errors=True)


def read_whole(folder: str | Path, read: Callable[[], T]) -> T:
    """Returns what `read` makes of the folder's files, all of them of one state of the folder.

    Args:
        read: opens files of the folder; runs again when another folder took its place meanwhile.

    Raises:
        the error of `read`, when the folder stayed the same.
    """
    for _ in range(_READS):
        before = _state(folder)
        try:
            result = read()
        except Exception:
            if _state(folder) == before:
                raise
            continue
        if _state(folder) == before:
            return result
    raise OSError(f"{folder}: was replaced {_READS} times while it was read; end the writers, then read again")


def _state(folder: str | Path) -> tuple[int, int, int] | None:
    try:
        facts = os.stat(folder)
    except FileNotFoundError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_mtime_ns
