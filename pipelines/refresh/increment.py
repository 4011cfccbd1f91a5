"""What has come to the histories since a finished refresh: a night need not look at what that one has looked at.

A bucket is settled when the files it had then are all there still: rows are only added to it, so that nobody but the
users of its further files can need a vector or a persona. A bucket whose files were rewritten (an item corrected or
gone, a user erased, a compaction) is looked at whole, and so is one with a text that is to be tried again (`RETRIED`).
"""

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow.compute as pc

from infra.snapshot import DataFile, Snapshot
from pipelines.histories import pair_keys

SETTLED = "settled"
"""In what a commit of personas says: texts and rejects of each bucket, as `stamp` writes them."""

RETRIED = frozenset({"not_finite"})
"""Reasons for which a text is tried again by every refresh: another dtype, batch or machine may give it a vector, and
none of these is part of an encoder's identity. The other reasons follow from the text and the identity alone."""


def retried(said: Mapping[str, str], encoder: str) -> frozenset[int]:
    """Buckets with a text that the refresh which said this has set aside and that is to be tried again."""
    if said.get("encoder_id") != encoder:
        return frozenset()
    counted = json.loads(said.get(SETTLED, "{}"))
    return frozenset(int(bucket) for bucket, (_, rejected) in counted.items() if not RETRIED.isdisjoint(rejected))


@dataclass(frozen=True)
class Late:
    """Vectors that have come after the stored personas: their users' histories are the same, their personas are not."""

    buckets: frozenset[int] = frozenset()
    """Where a text had been set aside that is tried again."""
    before: Snapshot | None = None
    """The vectors that the stored personas were made from; None: not known, all users of a bucket are made anew."""

    def users(self, now: Snapshot, bucket: int) -> Iterable[str] | None:
        """user_key of the users of a bucket who have a vector more; None means all of them."""
        if self.before is None:
            return None
        columns = ["user_key", "text_hash"]
        try:
            old = self.before.read(columns, buckets=[bucket])
        except FileNotFoundError:  # compacted, and a vacuum has removed what it was
            return None
        new = now.read(columns, buckets=[bucket])
        more = pc.invert(pc.is_in(pair_keys(new), value_set=pc.unique(pair_keys(old))))
        return pc.unique(new["user_key"].filter(more)).to_pylist()


@dataclass(frozen=True)
class Since:
    """Files that have come to each settled bucket, and what the finished run counted there."""

    before: Snapshot | None = None
    """The histories that run read; None: no run to go on from, every bucket is looked at whole."""
    come: Mapping[int, list[DataFile]] = field(default_factory=dict)
    texts: Mapping[int, int] = field(default_factory=dict)
    rejected: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    """By reason; such a text has no vector, and while its bucket is settled the same outcome is counted again."""

    @classmethod
    def of(cls, said: Mapping[str, str], before: Snapshot, now: Snapshot) -> "Since":
        """From what the finished run said, the histories it read and those of now."""
        counted = {int(bucket): found for bucket, found in json.loads(said[SETTLED]).items()}
        then, files = before.by_bucket(), now.by_bucket()
        come = {}
        for bucket in counted.keys() - retried(said, said["encoder_id"]):
            known = {file.path for file in then.get(bucket, ())}
            if known <= {file.path for file in files.get(bucket, ())}:
                come[bucket] = [file for file in files.get(bucket, ()) if file.path not in known]
        return cls(
            before,
            come,
            {bucket: counted[bucket][0] for bucket in come},
            {bucket: counted[bucket][1] for bucket in come},
        )

    def unmoved(self, bucket: int) -> bool:
        """Whether nothing at all has come to the bucket."""
        return bucket in self.come and not self.come[bucket]

    def only(self, buckets: Collection[int]) -> "Since":
        """Without the other buckets: these are looked at whole."""
        return dataclasses.replace(
            self, come={bucket: files for bucket, files in self.come.items() if bucket in buckets}
        )

    def part(self, histories: Snapshot, bucket: int) -> Snapshot:
        """What has come to a settled bucket, as a snapshot of its own."""
        return dataclasses.replace(histories, files=self.come[bucket])

    def users(self, histories: Snapshot, bucket: int) -> list[str] | None:
        """user_key of the users whose items have come; None, which is everybody, where the bucket is not settled."""
        if bucket not in self.come:
            return None
        return pc.unique(self.part(histories, bucket).read(["user_key"])["user_key"]).to_pylist()


def stamp(texts: Mapping[int, int], rejected: Mapping[int, Mapping[str, int]]) -> str:
    """What a finished run says of its buckets, for the next one's `Since.of`."""
    return json.dumps({bucket: [n, dict(rejected.get(bucket, {}))] for bucket, n in texts.items()})
