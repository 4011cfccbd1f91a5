"""Job `export`: a table -> a folder of plain Parquet; or one user's adapter -> a PEFT folder.

`config.py` describes the job and its keys.
"""

import json
import re

from infra import lease, session
from infra.errors import InputError
from infra.report import RunReport
from infra.snapshot import Snapshot
from infra.storage import Storage
from infra.table import Table
from pipelines import tables
from pipelines.run import begin
from pipelines.upkeep.config import ExportConfig as Config
from pipelines.upkeep.count_runs import count_runs
from pipelines.upkeep.export_adapter import export_adapter
from pipelines.upkeep.export_table import ExportBucket, vector_widths
from pipelines.waves import each_bucket
from pplug.folder import RUN_FILES
from pplug.identity import model_folder
from pplug.llm import LLMConfig, llm_id
from pplug.stand_in import SAMPLE, stands_for

DONE = "_SUCCESS"
PART_FILE = r"part-\d{5,}\.parquet|\.[0-9a-f]{32}\.tmp"
"""Names of files that a killed export may have left."""


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    # the config may name a user: the report does not
    shown = config.model_dump(exclude={"user_id"})
    report = begin("export", config, shown=shown)
    with lease.reading(config.tables, report.run_id):
        if config.user_id is not None and config.llm is not None:
            return _adapter(config, config.user_id, config.llm, report)
        return _table(config, report)


def _adapter(config: Config, user_id: str, llm: LLMConfig, report: RunReport) -> int:
    adapters = tables.open_table(config.tables, "adapters")
    metadata = adapters.snapshot(complete=True).metadata
    base = metadata.get("llm_id")
    try:
        folder = model_folder(llm.model, llm.revision)
        stands_for(llm, llm_id(llm), base, metadata.get(SAMPLE))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"llm: the adapters there are made for base {base}: {error}") from error
    report.planned = report.written = 1
    report.extra["adapter_id"] = export_adapter(adapters, user_id, config.output, folder.resolve(), base or "")
    code = report.finish()
    print(f"adapter {report.extra['adapter_id']}: {config.output}", flush=True)
    return code


def _table(config: Config, report: RunReport) -> int:
    (name,) = tables.chosen(config.tables, [config.table])
    table = tables.open_table(config.tables, name)
    snapshot = table.snapshot(config.as_of_version, complete=config.as_of_version is None)
    output = Storage(config.output)
    if output.exists(DONE):
        raise InputError(f"{config.output} holds a complete export, which is never changed; give another folder")
    others = [name for name in output.list() if not re.fullmatch(PART_FILE, name) and name not in RUN_FILES]
    if others:  # an export deletes all files that are not its own, such as the halves of a killed one
        raise InputError(
            f"{config.output} holds {others[0]} and {len(others) - 1} more files that no export has written; an export "
            "replaces all files in its folder: give it a folder of its own"
        )
    session.start(writes={"tables": config.tables, "output": config.output})
    if name == "generations" and config.as_of_version is None:
        _refuse_unended(table, snapshot)
    report.table_read(name, snapshot.version)
    report.planned = snapshot.rows
    with report.stage("export") as stage:
        stage.rows = report.written = _export(snapshot, output)
    report.extra["output"] = output.uri
    return report.finish()


def _refuse_unended(table: Table, snapshot: Snapshot) -> None:
    """Refuses first rows of a run, which another run's end has made a part of a complete version.

    Raises:
        InputError: names the runs.
    """
    if half := table.unended(sorted(count_runs(snapshot)), snapshot.version):
        raise InputError(
            f"{table.uri}: run {', '.join(half)} has not ended, so that version {snapshot.version} holds a part of its "
            f"replies; run that job again with run_id={half[0]} until it ends, or take its replies away "
            f"(`drop-run {half[0]}`), then this; --as-of-version {snapshot.version} exports them as they are"
        )


def _export(snapshot: "Snapshot", output: "Storage") -> int:
    stage = ExportBucket(snapshot, output.uri, vector_widths(snapshot))
    written = {row["name"]: row["rows"] for row in each_bucket(list(snapshot.by_bucket()), stage)}
    for name in output.list():  # of a killed export of another version
        if name not in written and name not in RUN_FILES:
            output.delete(name)
    facts = {
        "table": snapshot.spec.name,
        "version": snapshot.version,
        "rows": sum(written.values()),
        "files": dict(sorted(written.items())),
        **{key: value for key, value in snapshot.metadata.items() if key.endswith("_id")},
    }
    if facts["rows"] == snapshot.rows:
        output.write_bytes(DONE, json.dumps(facts, indent=2).encode())
    return sum(written.values())
