"""Job `vacuum`: deletes files that no version within the retention names, and none that a job may still need.

`config.py` describes the job and its keys.
"""

from infra import lease, upkeep
from pipelines import tables
from pipelines.run import begin
from pipelines.upkeep.config import VacuumConfig as Config


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    report = begin("vacuum", config)
    names = tables.chosen(config.tables, config.names)
    report.extra["deleted_bytes"] = 0
    with lease.writing(config.tables, report.run_id):
        for name in names:
            with report.stage(f"vacuum {name}") as stage:
                done = upkeep.vacuum(tables.open_table(config.tables, name), config.retention_hours)
                stage.rows = done.deleted
            report.planned += done.deleted + done.kept
            report.written += done.deleted
            report.already_there += done.kept
            report.extra["deleted_bytes"] += done.deleted_bytes
    report.extra["tables"] = tables.costs(config.tables, names)
    return report.finish()
