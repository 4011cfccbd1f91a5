"""What a run of `generate` refuses once its work is planned: known answers, another way of answering under one
run_id."""

from collections.abc import Mapping
from typing import Any

from infra.errors import InputError
from infra.report import RunReport
from infra.snapshot import Snapshot
from pipelines import made_from, tables
from pipelines.generate.config import Config
from pipelines.methods import Method
from pplug.identity import model_folder, short_id
from pplug.tasks import TaskEntry

KEPT = {
    "adapter": "run `adapt` again with cut=requests (the default), which cuts them at the requests that there are now",
    "profile": "run `generate --write-profiles` again, which cuts them at the requests that there are now",
}
"""What is kept per user and made from the user's items, and what to do where it knows too much."""


def refuse_a_leak(config: Config, methods: list[Method], leaks: Mapping[str, int]) -> None:
    """Refuses to answer a request whose answer is known by an adapter or a profile that may have learned it."""
    for kept, remedy in KEPT.items():
        if leaks[kept]:
            by_profile = kept == "profile"
            using = [m.name for m in methods if (m.profile if by_profile else m.adapter == "own")]
            raise InputError(
                f"methods {using}: the {kept}s in {config.tables} were made from items that {leaks[kept]} of the "
                f"requests with a known answer may not see, perhaps from the answers themselves; {remedy}, or ask for "
                "--requests open"
            )


def settings_id(config: Config, entry: "TaskEntry") -> str:
    """Identity of what decides a prompt beside the models, the decoding and the tables."""
    return short_id(
        {
            "retrieval": config.retrieval.decisive(),
            "profile": config.profile.decisive(),
            "history_cap": config.max_history_items,
            "task": entry.model_dump(mode="json"),
        }
    )


def refuse_another_run(said: Mapping[str, str], identities: Mapping[str, str], run_id: str) -> None:
    """Refuses to go on with a run whose replies were made otherwise: one run_id stands for one way of answering."""
    differ = [
        f"{name} {said[name]}, now {value}"
        for name, value in identities.items()
        if value and said.get(name, value) not in ("", value)
    ]
    if differ:
        raise InputError(
            f"run_id={run_id}: this run has replies of other models or settings ({'; '.join(differ)}); give those "
            "again, or another run_id"
        )


def check_base(config: Config, requests: "Snapshot", found: dict[int, dict[str, Any]], report: RunReport) -> None:
    """Refuses an LLM that has learned the answers of the requests; warns where that cannot be told."""
    counts = (sum(row[name] for row in found.values()) for name in ("dated", "with_target"))
    base, users = model_folder(config.llm.model, config.llm.revision), tables.read_users(config.users)
    for warning in made_from.check(base, config.tables, requests, users, *counts):
        print(f"generate: {warning}", flush=True)
        report.extra.setdefault("warnings", []).append(warning)
