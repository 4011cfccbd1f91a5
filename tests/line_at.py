"""The line from ingest to evaluate, in one process and one Ray session, once per place: a folder or an address.

    python -m tests.line_at WORLD BUCKETS PLACE...

WORLD is a folder with `world` (pplug.world.write), `encoder` and `llm`. A place at an address gets encoder and
LLM by `publish`, and all else that workers read or write lies there too: sources, tables, plug, run folders.
`commands` has the line as command lines, for tests that submit them.
"""

import os
import sys
from pathlib import Path

from infra import session
from infra.storage import Storage
from pipelines.__main__ import main

FILES = {"histories": "train/histories.jsonl", "requests": "train/requests.jsonl", "task": "task.yaml"}


def line(world: str, buckets: str, place: str) -> int:
    """Runs the jobs; returns the first exit code that is not 0."""
    return next((code for words in commands(world, buckets, place).values() if (code := main(words))), 0)


def commands(world: str, buckets: str, place: str, *asked: str, adapt: bool = False) -> dict[str, list[str]]:
    """The words behind `python -m pipelines` by run id, in order; the files that an address needs are put there.

    Args:
        asked: `--set` values of generate; methods none and plug on transformers without any.
        adapt: with users' adapters.
    """
    files = {name: os.path.join(world, "world", file) for name, file in FILES.items()}
    models = {name: f"{world}/{name}" for name in ("encoder", "llm")}
    found: dict[str, list[str]] = {}
    if "://" in place:
        for name, folder in models.items():
            models[name], run_id = f"{place}/models/{name}", f"publish-{name}"
            found[run_id] = ["publish", folder, "--to", models[name], "--run-dir", f"{place}/runs/{run_id}"]
        for name in ("histories", "requests"):
            Storage(place).write_bytes(FILES[name], Path(files[name]).read_bytes())
            files[name] = f"{place}/{FILES[name]}"
    encoder = [f"encoder.model={models['encoder']}", "encoder.dtype=float32", "encoder.max_tokens=64"]
    llm, plug = [f"llm.model={models['llm']}"], f"plug={place}/plug"
    fit = ["fit.epochs=1", "fit.batch_size=16", "fit.precision=float32", "fit.val_fraction=0.3"]
    replies = ["decoding.max_tokens=4", *(asked or ("methods=none,plug", "engine.kind=transformers"))]
    source = [f"source={files['histories']}", f"requests_source={files['requests']}", f"task={files['task']}"]
    jobs = {
        "ingest": [*source, f"buckets={buckets}"],
        "refresh": encoder,
        "train": [*encoder, *llm, *fit, plug],
        "refresh-plug": [*encoder, plug],
        "adapt": llm,
        "generate": [*llm, plug, *replies],
        "evaluate": ["run=generate"],
    }
    for run_id, values in jobs.items():
        if run_id != "adapt" or adapt:
            common = [f"tables={place}/tables", f"run_id={run_id}", f"run_dir={place}/runs/{run_id}"]
            job = run_id.partition("-")[0]
            found[run_id] = [job, *(word for value in [*values, *common] for word in ("--set", value))]
    return found


if __name__ == "__main__":
    session.start(object_store_bytes=300 * 2**20)
    try:
        sys.exit(next((code for place in sys.argv[3:] if (code := line(*sys.argv[1:3], place))), 0))
    finally:
        session.stop()
