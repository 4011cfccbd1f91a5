"""Adapters on their way from the table to the engine: chosen for a request, fetched, checked, laid out as PEFT folders.

Only names travel with the prompts; weights go from the table's files to folders in memory, beside the engine.
"""

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra import temporary
from infra.shards import bucket_of_key
from infra.snapshot import Snapshot
from pipelines.learned import last_items
from pipelines.owners import Owners, in_turn
from pplug.adapter import AdapterShape, base_shapes, from_bytes, to_bytes, write_folder
from pplug.controls import drawn_for

MEMORY = "/dev/shm"


@dataclass(frozen=True)
class AdapterName:
    """Name of an adapter: the key of its user and an id that changes with its content. No user id stands in it."""

    user_key: str
    adapter_id: str

    def __str__(self) -> str:
        return f"{self.user_key}@{self.adapter_id}"


@dataclass(frozen=True)
class Adapters:
    """The adapters of a run: the table's version, and what an engine has to be made ready for."""

    snapshot: Snapshot
    buckets: int
    llm_id: str
    rank: int
    """Greatest rank among the adapters."""
    targets: tuple[str, ...]
    """All modules that any of the adapters changes."""


def facts(snapshot: Snapshot, batch: pa.Table) -> pa.Table:
    """Stage of the plan. in: bucket. out: bucket, rank (the greatest), targets."""
    (bucket,) = batch["bucket"].to_pylist()
    rows = snapshot.read(["rank", "targets"], buckets=[bucket])
    targets = sorted({target for row in rows["targets"].to_pylist() for target in row})
    return pa.table({"bucket": [bucket], "rank": [pc.max(rows["rank"]).as_py()], "targets": [targets]})


class AdapterIndex:
    """Adapters of a bucket's users, by user."""

    def __init__(self, adapters: Snapshot, bucket: int, owners: Owners, user_keys: Sequence[str] | None = None) -> None:
        """`owners`: read for `other` alone. `user_keys`: whose adapters are read; all for `other`."""
        self._adapters, self._bucket, self._owners = adapters, bucket, owners
        self._here = self._read(bucket, user_keys)
        self._made_from = last_items(adapters, bucket, user_keys)
        self._pool: dict[int, tuple[dict[str, AdapterName], dict[str, frozenset[str]]]] = {}

    def _read(self, bucket: int, user_keys: Sequence[str] | None = None) -> dict[str, AdapterName]:
        columns = ["user_id", "user_key", "adapter_id"]
        rows = self._adapters.read(columns, buckets=[bucket], user_keys=user_keys).sort_by("user_key").to_pylist()
        return {row["user_id"]: AdapterName(row["user_key"], row["adapter_id"]) for row in rows}

    def own(self, request: Mapping[str, Any]) -> AdapterName | None:
        """The user's adapter; None where there is none, or where it `knows_too_much`."""
        return None if self.knows_too_much(request) else self._here.get(request["user_id"])

    def knows_too_much(self, request: Mapping[str, Any]) -> bool:
        """True if the user's adapter was trained on items that the request may not see."""
        made_from = self._made_from.get(request["user_id"])
        return made_from is not None and not made_from.is_visible_to(request)

    def other(self, request: Mapping[str, Any]) -> AdapterName | None:
        """Another person's adapter: drawn by the person's hash, so that every run draws alike."""
        owner = request["owner_id"]
        for pool, owners in self._pools():
            choice = [
                name
                for user, name in pool.items()
                if user != request["user_id"] and owner not in owners.get(user, {user})
            ]
            if choice:
                return drawn_for(owner, choice)
        return None

    def _pools(self) -> Iterator[tuple[dict[str, AdapterName], dict[str, frozenset[str]]]]:
        """Yields adapters and owners of this bucket, then, for a user who is alone in it, those of the others."""
        for bucket in in_turn(self._bucket, self._adapters.by_bucket()):
            if bucket not in self._pool:
                adapters = self._here if bucket == self._bucket else self._read(bucket)
                self._pool[bucket] = adapters, self._owners.of(bucket)
            yield self._pool[bucket]


class AdapterShelf:
    """PEFT folders, one per adapter, on a disk in memory; while that is full, among the temporary files."""

    def __init__(self, adapters: Adapters, base: Path) -> None:
        self._adapters, self._base = adapters, base
        disk = tempfile.gettempdir()
        memory = MEMORY if os.access(MEMORY, os.W_OK) else disk
        self.folder, self.overflow = (temporary.lasting("adapters", place) for place in (memory, disk))
        self._shapes: dict[tuple[str, ...], dict[str, tuple[int, int]]] = {}
        self._reads_base = threading.Lock()

    def put(self, name: AdapterName) -> Path:
        """Fetches one adapter, checks it and writes its folder.

        Raises:
            ValueError: it is not in the table's version, or not what it has to be.
        """
        bucket = bucket_of_key(name.user_key, self._adapters.buckets)
        columns = ["adapter_id", "rank", "alpha", "targets", "weights"]
        found = self._adapters.snapshot.read(columns, buckets=[bucket], user_keys=[name.user_key]).to_pylist()
        row = next((row for row in found if row["adapter_id"] == name.adapter_id), None)
        if row is None:
            raise ValueError(f"adapter {name.adapter_id}: no longer in the table's version")
        shape = AdapterShape(targets=tuple(row["targets"]), rank=row["rank"], alpha=row["alpha"])
        with self._reads_base:  # transformers sets the default number format of the whole process meanwhile
            if shape.targets not in self._shapes:
                self._shapes[shape.targets] = base_shapes(self._base, shape.targets)
        from_bytes(row["weights"] or b"", shape, self._shapes[shape.targets], self._adapters.llm_id)
        return self._written(str(name), row["weights"], shape)

    def put_nothing(self) -> Path:
        """The folder of an adapter that adds nothing."""
        import torch  # the configs that `--help` shows import this module

        targets = self._adapters.targets
        shape = AdapterShape(targets=targets, rank=1, alpha=1.0)
        weights = {
            name: (torch.zeros(1, width_in), torch.zeros(width_out, 1))
            for name, (width_in, width_out) in base_shapes(self._base, targets).items()
        }
        return self._written("none", to_bytes(weights, self._adapters.llm_id), shape)

    def _written(self, name: str, data: bytes, shape: AdapterShape) -> Path:
        path = self.folder / name
        try:
            write_folder(path, data, shape, str(self._base))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            # A container of docker has 64 MB there by default, and an engine on a CPU may keep the file mapped.
            shutil.rmtree(path, ignore_errors=True)
            path = self.overflow / name
            write_folder(path, data, shape, str(self._base))
        return path

    def drop(self, name: AdapterName) -> None:
        for folder in (self.folder, self.overflow):
            shutil.rmtree(folder / str(name), ignore_errors=True)

    def close(self) -> None:
        for folder in (self.folder, self.overflow):
            temporary.remove(folder)
