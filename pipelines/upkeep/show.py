"""Job `show`: rows of a table -> text on the screen.

`config.py` describes the job and its keys.
"""

from typing import Any

from infra import job_log
from infra.errors import InputError
from infra.snapshot import Snapshot
from pipelines import shown, tables
from pipelines.upkeep.config import ShowConfig as Config

REPLIES = "replies"
_OF_RUNS = ("generations", "rejects", REPLIES)


def run(config: Config) -> int:
    """Prints the rows; returns 0."""
    if config.table is None:
        tables.chosen(config.tables, None)
        for line in shown.overview(config.tables):
            print(line)
        return 0
    name = _table(config)
    if config.run is not None and config.table not in _OF_RUNS:
        raise InputError(f"run={config.run}: only {', '.join(_OF_RUNS)} have a run per row; leave --run out")
    if config.user_id is not None and name == "rejects":
        raise InputError("user_id: rejects belong to rows of a source, not to users; leave --user-id out")
    snapshot = _snapshot(config.tables, name)
    choice: dict[str, Any] = {"user_id": config.user_id, "bucket": config.bucket}
    if config.table == REPLIES:
        requests = _snapshot(config.tables, "requests")
        texts = list(shown.replies(snapshot, requests, config.run, config.rows, **choice))
    else:
        texts = [shown.as_text(row) for row in shown.first_rows(snapshot, config.rows, run_id=config.run, **choice)]
    for text in texts:
        job_log.show(text)
    what = "requests with replies" if config.table == REPLIES else "rows"
    print(f"{name}: {len(texts)} {what} of {snapshot.rows:,} rows, {shown.state(snapshot)}")
    return 0


def _table(config: Config) -> str:
    """Returns the table's own name: `replies` are in generations, and embeddings have one table per encoder."""
    wanted = "generations" if config.table == REPLIES else config.table
    there = tables.chosen(config.tables, None)
    if wanted == "embeddings":
        found = [name for name in there if name.startswith("embeddings-")]
        if len(found) == 1:
            return found[0]
    return tables.chosen(config.tables, [wanted or ""])[0]


def _snapshot(location: str, name: str) -> Snapshot:
    table = tables.open_table(location, name)
    try:
        return table.snapshot(complete=True)
    except InputError:  # the first run has not ended: what it has written is all there is to see
        return table.snapshot()
