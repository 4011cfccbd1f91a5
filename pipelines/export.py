"""Job `export`: one user's adapter -> a PEFT folder that `peft.PeftModel.from_pretrained` and vLLM load.

The folder holds weights and settings of the adapter alone, no text and no name of anybody. Unit of work: a user.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from infra.errors import InputError
from infra.report import RunReport, new_run_id
from pplug.llm import LLMConfig


class Config(BaseModel):
    """Whose adapter, and where to."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tables: str
    """Folder or s3:// prefix of the population's tables."""
    user_id: str
    """Whose adapter."""
    output: str
    """Folder that is written."""
    llm: LLMConfig
    """The base it was trained on, with its prompt layout."""
    run_id: str | None = None
    """Name of the run."""
    run_dir: str | None = None
    """Default: runs/<run_id>."""


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    from pipelines import tables
    from pipelines.stages.export_adapter import export_adapter
    from pplug.identity import model_folder
    from pplug.llm import llm_id

    run_id = config.run_id or new_run_id("export")
    # the config names a user: the report does not
    shown = config.model_dump(exclude={"user_id"})
    report = RunReport("export", run_id, shown, config.run_dir or f"runs/{run_id}")
    adapters = tables.open_table(config.tables, "adapters")
    try:
        folder, base = model_folder(config.llm.model, config.llm.revision), llm_id(config.llm)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"llm: {error}") from error
    report.planned = report.written = 1
    report.extra["adapter_id"] = export_adapter(adapters, config.user_id, Path(config.output), folder.resolve(), base)
    code = report.finish()
    print(f"adapter {report.extra['adapter_id']}: {config.output}", flush=True)
    return code
