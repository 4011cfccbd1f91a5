"""Jobs one after the other, each by a config file that stays below the run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from infra.errors import InputError
from infra.storage import Storage
from pipelines.__main__ import main

Steps = Mapping[str, tuple[str, dict[str, Any]]]
"""Job and its config by step, in order."""


def local_root(run_dir: str) -> Path:
    """The run folder of a line, which keeps models and configs of all its jobs on this machine.

    Raises:
        InputError: it is an address.
    """
    if Storage(run_dir).is_s3:
        raise InputError(
            f"run_dir={run_dir}: a line of jobs keeps its models and configs in a folder; give one, or run the jobs "
            "one by one, each of which takes s3://"
        )
    return Path(run_dir)


def run_steps(planned: Steps, root: Path, done: int = 0) -> int:
    """Prints and runs each step; returns the exit code of the first that fails, else 0.

    Args:
        root: run folder; the configs stand in `configs` below it.
        done: number of steps that were run before these, and count with them.
    """
    (root / "configs").mkdir(parents=True, exist_ok=True)
    for number, (step, (job, values)) in enumerate(planned.items(), start=done + 1):
        path = root / "configs" / f"{step}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        command = f"python -m pipelines {job} --config {path}"
        print(f"\nstep {number} of {done + len(planned)}: {step}\n$ {command}", flush=True)
        code = main([job, "--config", str(path)])
        if code:
            return code
    return 0
