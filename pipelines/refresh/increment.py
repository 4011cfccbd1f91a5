"""What has come to the histories since a finished refresh: a night need not look at what that one has looked at.

A bucket is settled when the files it had then are all there still: rows are only added to it, so that nobody but the
users of its further files can need a vector or a persona. A bucket whose files were rewritten (an item corrected or
gone, a user erased, a compaction) is looked at whole.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import pyarrow.compute as pc

from infra.snapshot import DataFile, Snapshot

SETTLED = "settled"
"""In what a commit of personas says: texts and rejects of each bucket, as `stamp` writes them."""


@dataclass(frozen=True)
class Since:
    """Of each settled bucket the files that have come, and what the finished run counted there."""

    before: Snapshot | None = None
    """The histories that run read; None: no run to go on from, every bucket is looked at whole."""
    come: Mapping[int, list[DataFile]] = field(default_factory=dict)
    texts: Mapping[int, int] = field(default_factory=dict)
    rejected: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    """By reason; such a text has no vector and is not tried again while its bucket is settled."""

    @classmethod
    def of(cls, said: Mapping[str, str], before: Snapshot, now: Snapshot) -> "Since":
        """From what the finished run said, the histories it read and those of now."""
        counted = {int(bucket): found for bucket, found in json.loads(said[SETTLED]).items()}
        then, files = before.by_bucket(), now.by_bucket()
        come = {}
        for bucket in counted:
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
