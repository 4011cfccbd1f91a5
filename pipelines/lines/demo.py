"""Job `demo`: the whole line on an embedded world, no download, a CPU is enough.

`config.py` says what it does, and holds its keys.
"""

import itertools
import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from infra import session
from infra.errors import InputError
from infra.job_log import LINE_LOG, JobLog
from pipelines.__main__ import main
from pipelines.lines.config import DemoConfig as Config
from pipelines.lines.steps import local_root
from pplug import world
from pplug.world import INPUT

MARK = ".pplug-demo"
TOLD_WITHIN = 0.1
"""Largest distance of the oracle prompt from the best possible score at which the comparison means anything."""
METHODS = ("none", "bm25", "plug", "plug:mean", "plug:no-history", "plug:other-user", "oracle")
WITH_ADAPTER = ("none", "plug", "adapter", "adapter:other-user")
"""Methods scored for users who own an adapter: training one for everybody would take as long as all the rest."""


def run(config: Config) -> int:
    """Runs the line; returns the exit code of the first job that fails, else 0."""
    start, config = time.monotonic(), config.sized()
    root = _fresh(local_root(config.run_dir))
    if JobLog.current is not None:
        JobLog.current.move_to(str(root), LINE_LOG)
    settings = world.WorldConfig(
        seed=config.seed,
        train_users=config.train_users,
        test_users=config.test_users,
        corpus_users=config.corpus_users,
        stated=0.55,
        shown=0.25,
        evenness=0.75,  # popular themes stand out enough for a tiny LM to know them without being told whose item it is
        items=(20, 50),
    )
    print(f"demo: writes a world of {config.train_users} people to learn from and {config.test_users} unseen ones")
    files = {name: str(path) for name, path in world.write(settings, root / "world").items()}
    some = itertools.islice(world.population(settings, "test"), config.adapter_users)
    files["adapter-users"] = str(root / "world" / "adapter-users.txt")
    Path(files["adapter-users"]).write_text("".join(f"{person.user_id}\n" for person in some))

    session.start()  # once: the jobs below use this session
    commands = _line(config, root, files)
    for number, words in enumerate(commands, start=1):
        print(f"\nstep {number} of {len(commands)}: {words[0]}\n$ python -m pipelines {shlex.join(words)}", flush=True)
        code = _job(words)
        if code:
            print(
                f"demo: {words[0]} ended with exit code {code}; a new demo empties {root} and begins anew",
                file=sys.stderr,
            )
            return code
    minutes = (time.monotonic() - start) / 60
    problem = weakness(json.loads((root / "report.json").read_text()))
    if problem:
        print(f"demo: {problem}", file=sys.stderr)
    print(
        f"\ndemo {'ended' if problem else 'done'} in {minutes:.1f} minutes; report: {root / 'report.html'}, "
        f"of those with an adapter: {root / 'adapters' / 'report.html'}"
    )
    return int(bool(problem))


def weakness(report: dict[str, Any]) -> str | None:
    """Returns the reason why the scores say nothing about the plug: the tiny LM never learned to use a preference.

    That skill appears in its training all at once, and with a short training or an unlucky seed not at all.
    """
    told, best = report["methods"]["oracle"]["scores"]["accuracy"], report["reference"]["best_with_history"]
    if told >= best - TOLD_WITHIN:
        return None
    return (
        f"the base LM did not learn to use a preference that its prompt states (accuracy {told:.3f}, possible "
        f"{best:.3f}), so the scores above say nothing about the plug; give --lm-steps more or another --seed"
    )


def _line(config: Config, root: Path, files: dict[str, str]) -> list[list[str]]:
    """The commands, as a user would type them."""
    tables, lm, plug = f"{root}/tables", f"{root}/base-lm", f"{root}/plug"
    layout = [f"llm.model={lm}", "llm.layout.max_input_tokens=200"]

    def own(job: str) -> list[str]:
        return ["--run_id", f"demo-{job}", "--run_dir", f"{root}/{job}"]

    def named(methods: Iterable[str]) -> str:
        return f"[{', '.join(methods)}]"

    def ingest(split: str, *more: str) -> list[str]:
        source = ["--tables", f"{tables}/{split}", "--source", files[f"{split}/histories"], "--task", files["task"]]
        return ["ingest", *source, *more, *own(f"ingest-{split}")]

    def requests(split: str) -> tuple[str, str]:
        return "--requests-source", files[f"{split}/requests"]

    return [
        ingest("corpus"),
        ["base-lm", "--tables", f"{tables}/corpus", "--output", lm, "--prompt", "{preface}" + INPUT, *own("base-lm"),
         "--set", f"lm.steps={config.lm_steps}", f"lm.seed={config.seed}",
         "lm.short_first=0.6", "lm.init_std=0.09"],  # without, to read a stated preference is learnt late, or never
        ingest("train", *requests("train")),
        ["refresh", "--tables", f"{tables}/train", *own("refresh-train")],
        ["train", "--tables", f"{tables}/train", "--plug", plug, *own("train"), "--set", *layout,
         "shape.persona_tokens=8", f"fit.epochs={config.epochs}", f"fit.seed={config.seed}", "fit.learning_rate=3e-3",
         "fit.query_learning_rate=0", "fit.item_dropout=0.2", "fit.history_dropout=0.1", "shape.temperature=0.2"],
        ingest("test", *requests("test")),
        ["refresh", "--tables", f"{tables}/test", "--plug", plug, *own("refresh-test")],
        ["adapt", "--tables", f"{tables}/test", "--users", files["adapter-users"], *own("adapt"), "--set", *layout,
         f"lora.seed={config.seed}", "lora.learning_rate=0.015", "lora.epochs=3", "lora.batch_size=8"],
        ["generate", "--tables", f"{tables}/test", "--plug", plug, "--oracle", files["oracle"], *own("generate"),
         "--methods", named(dict.fromkeys(METHODS + WITH_ADAPTER)), "--set", *layout, "decoding.max_tokens=8"],
        ["evaluate", "--tables", f"{tables}/test", "--run", "[demo-generate]", "--methods", named(WITH_ADAPTER),
         "--users", files["adapter-users"], *own("adapters")],
        ["evaluate", "--tables", f"{tables}/test", "--run", "[demo-generate]", "--reference", files["truth"],
         "--methods", named(METHODS), "--examples", "10",
         "--run_id", config.run_id, "--run_dir", str(root)],
    ]  # fmt: skip


def _job(words: list[str]) -> int:
    return main(words)


def _fresh(root: Path) -> Path:
    """An empty folder for the demo; only a folder that a demo made is ever removed."""
    if root.exists() and any(root.iterdir()):
        if not (root / MARK).exists():
            raise InputError(f"run_dir {root}: exists and was not made by a demo; give another --run-dir or remove it")
        for path in root.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != MARK:  # last, so that a demo that is killed here is known for one
                path.unlink()
    root.mkdir(parents=True, exist_ok=True)
    (root / MARK).write_text("Made by `python -m pipelines demo`, which may remove it.\n")
    return root
