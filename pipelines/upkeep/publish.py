"""Job `publish`: a folder with a plug, an LLM or an encoder -> an address that every node can fetch it from.

`config.py` describes the job and its keys.
"""

from pathlib import Path

from infra import artifacts
from infra.errors import InputError
from infra.report import RunReport, new_run_id
from pipelines.model_folders import check_output
from pipelines.upkeep.config import PublishConfig as Config


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    folder = Path(config.folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"folder={config.folder}: there is no such folder on this machine")
    if not artifacts.is_address(config.to):
        raise InputError(f"to={config.to}: not an address to publish at; expected s3://bucket/prefix")
    names = [path.name for path in folder.iterdir()]
    if not names:
        raise InputError(f"folder={config.folder}: the folder is empty")
    check_output("to", config.to, names)
    run_id = config.run_id or new_run_id("publish")
    report = RunReport("publish", run_id, config.model_dump(), config.run_dir or f"runs/{run_id}")
    with report.stage("publish") as stage:
        report.written, report.already_there = artifacts.publish(folder, config.to)
        stage.rows = report.planned = report.written + report.already_there
    report.extra["to"] = config.to
    return report.finish()
