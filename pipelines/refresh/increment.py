"""The rows that were added to the histories since a finished refresh; a night looks at nothing else where it can.

A bucket is settled when all files that it had then still exist: rows were only added to it, so that only the users of
its new files can need a vector or a persona. A bucket whose files were rewritten (an item corrected or
gone, a user erased, a compaction) is looked at whole, and so is one with a text that is to be tried again (`RETRIED`).
"""

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow.compute as pc

from infra.snapshot import DataFile, Snapshot
from pipelines.histories import pair_keys
from pipelines.tables import SETTLED

RETRIED = frozenset({"not_finite"})
"""Reasons for which a text is tried again by every refresh: another dtype, batch or machine may give it a vector, and
none of these is part of an encoder's identity. The other reasons follow from the text and the identity alone."""


def retried(metadata: Mapping[str, str], encoder: str) -> frozenset[int]:
    """Buckets with a text that the refresh which made this commit set aside and that must be tried again."""
    if metadata.get("encoder_id") != encoder:
        return frozenset()
    counted = json.loads(metadata.get(SETTLED, "{}"))
    return frozenset(int(bucket) for bucket, (_, rejected) in counted.items() if not RETRIED.isdisjoint(rejected))


@dataclass(frozen=True)
class Late:
    """Vectors that have come after the stored personas: their users' histories are the same, their personas are not."""

    buckets: frozenset[int] = frozenset()
    """Buckets in which a text had been set aside that is tried again."""
    before: Snapshot | None = None
    """The vectors that the stored personas were made from. If None, the version is unknown, and all personas of a
    bucket are made anew."""

    def users(self, now: Snapshot, bucket: int) -> Iterable[str] | None:
        """user_key of the users of a bucket who have new vectors; None means all of them."""
        if self.before is None:
            return None
        columns = ["user_key", "text_hash"]
        try:
            old = self.before.read(columns, buckets=[bucket])
        except FileNotFoundError:  # compacted, and a vacuum has removed the old files
            return None
        new = now.read(columns, buckets=[bucket])
        more = pc.invert(pc.is_in(pair_keys(new), value_set=pc.unique(pair_keys(old))))
        return pc.unique(new["user_key"].filter(more)).to_pylist()


@dataclass(frozen=True)
class Since:
    """Files that were added to each settled bucket, and what the finished run counted there."""

    before: Snapshot | None = None
    """The histories that run read; None: no run to go on from, every bucket is looked at whole."""
    added: Mapping[int, list[DataFile]] = field(default_factory=dict)
    texts: Mapping[int, int] = field(default_factory=dict)
    rejected: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    """Texts set aside, by reason: they have no vector, and while their bucket is settled they are counted again."""

    @classmethod
    def of(cls, metadata: Mapping[str, str], before: Snapshot, now: Snapshot) -> "Since":
        """Compares the histories that the finished run read with those of now. `metadata`: of its commit."""
        counted = {int(bucket): found for bucket, found in json.loads(metadata[SETTLED]).items()}
        then, files = before.by_bucket(), now.by_bucket()
        added = {}
        for bucket in counted.keys() - retried(metadata, metadata["encoder_id"]):
            known = {file.path for file in then.get(bucket, ())}
            if known <= {file.path for file in files.get(bucket, ())}:
                added[bucket] = [file for file in files.get(bucket, ()) if file.path not in known]
        return cls(
            before,
            added,
            {bucket: counted[bucket][0] for bucket in added},
            {bucket: counted[bucket][1] for bucket in added},
        )

    def is_unchanged(self, bucket: int) -> bool:
        """Returns whether the bucket is as it was."""
        return bucket in self.added and not self.added[bucket]

    def only(self, buckets: Collection[int]) -> "Since":
        """Leaves the other buckets out: they are looked at whole."""
        return dataclasses.replace(
            self, added={bucket: files for bucket, files in self.added.items() if bucket in buckets}
        )

    def part(self, histories: Snapshot, bucket: int) -> Snapshot:
        """The rows that were added to a settled bucket, as a snapshot of its own."""
        return dataclasses.replace(histories, files=self.added[bucket])

    def users(self, histories: Snapshot, bucket: int) -> list[str] | None:
        """user_key of the users whose items were added; None means all users, where the bucket is not settled."""
        if bucket not in self.added:
            return None
        return pc.unique(self.part(histories, bucket).read(["user_key"])["user_key"]).to_pylist()


def settled_text(texts: Mapping[int, int], rejected: Mapping[int, Mapping[str, int]]) -> str:
    """Writes the counts of a finished run per bucket, for the next run's `Since.of`."""
    return json.dumps({bucket: [n, dict(rejected.get(bucket, {}))] for bucket, n in texts.items()})
