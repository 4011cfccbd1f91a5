"""Migration of one table: its rows go through the steps of its spec, and one commit puts them in the old rows' place.

A change that raises `TableSpec.schema_version` adds a step from the version before to `TableSpec.steps`. Workers read
a bucket with the columns that the table has, apply the steps and write the rows as one new file. The commit then takes
away the old files, and sets the new columns and the new schema version. A killed run leaves the table as it was, and
beside it files that no version names, so that the same command starts that table again.
"""

from dataclasses import dataclass

from infra.errors import InputError
from infra.rows import TableSpec
from infra.snapshot import DataFile, Snapshot, read_files, with_added
from infra.table import Table


@dataclass(frozen=True)
class Migration:
    """A table of an older schema version, and the same table as this release writes it."""

    table: Table
    before: Snapshot
    """The newest version, with the columns and the schema version that it has."""

    @property
    def summary(self) -> str:
        """Describes the migration in words."""
        return (
            f"{self.table.spec.name}: schema version {self.before.spec.schema_version} to "
            f"{self.table.spec.schema_version}, {self.before.rows} rows in {len(self.before.files)} files"
        )

    def write(self, bucket: int, run_id: str) -> list[DataFile]:
        """Applies the steps to a bucket's rows and writes them; -1 stands for all rows of an unbucketed table.

        Raises:
            ValueError: a step returns another number of rows or rows of another bucket, or the rows lack a column.
        """
        spec, files = self.table.spec, self.before.by_bucket()[bucket]
        rows = read_files(files, spec=self.before.spec)
        expected = sum(file.rows for file in files)
        for version in range(self.before.spec.schema_version, spec.schema_version):
            rows = spec.steps[version](rows)
            if rows.num_rows != expected:
                raise ValueError(
                    f"table {spec.name}: the step from schema version {version} makes {rows.num_rows} rows of bucket "
                    f"{bucket}, whose files hold {expected} by the log; a step returns one row per row"
                )
        new = self.table.write(with_added(rows, None, spec), run_id)
        if {file.bucket for file in new} - {file.bucket for file in files}:
            raise ValueError(f"table {spec.name}: a step has moved rows of bucket {bucket} to another bucket")
        return new


def pending(uri: str, spec: TableSpec) -> Migration | None:
    """Returns the migration that a table needs; None when it has the schema version of the spec.

    Raises:
        InputError: the table is newer than this release, a step is missing, or a run has not ended on the table.
    """
    stored = Table.open_as_stored(uri, spec)
    have, want = stored.spec.schema_version, spec.schema_version
    if have >= want:
        Table.open(uri, spec)  # refuses a newer one
        return None
    missing = [version for version in range(have, want) if version not in spec.steps]
    if missing:
        raise InputError(
            f"{stored.uri}: table {spec.name} has schema version {have}, and this release has no step from version "
            f"{missing[0]} to {missing[0] + 1}; migrate it with an earlier release first, or write a new table"
        )
    before = stored.snapshot()
    run_id = before.metadata.get("run_id")
    if run_id is not None and before.metadata.get("complete") != "true":
        raise InputError(
            f"{stored.uri}: run {run_id} has not ended on table {spec.name}, so its rows are not all there; end that "
            f"run, or restore the table, with the release that reads schema version {have}, then migrate"
        )
    return Migration(Table(stored.uri, spec, stored.buckets), before)
