"""The table of families, measured: each family in a process of its own, since an engine may end its process.

`python -m tests.families [NAME...]` measures families and writes docs/families.md.
"""

import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from tests.families.models import FAMILIES, Family

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
LIMIT_S = 240
Results = dict[str, dict[str, str]]


def measured(families: Iterable[Family]) -> Results:
    """Family -> column -> "yes" or the reason. The engine's modules are imported once, and shared by all processes."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm.v1.engine.async_llm  # noqa: F401

    import tests.families.measure  # noqa: F401

    return {family.name: _apart(family) for family in families}


def _apart(family: Family) -> dict[str, str]:
    """A family measured in forks of this process: what an engine with adapters does not tell, one without them does."""
    from tests.families.measure import COLUMNS, measure, measure_replies

    found = _forked(measure, family, COLUMNS)
    if found.get("replies with rows") != "yes":
        found |= _forked(measure_replies, family, ("replies with rows",))
    return {column: found[column] for column in COLUMNS}


def _forked(task: Callable[..., None], family: Family, columns: Sequence[str]) -> dict[str, str]:
    """Answers of a task in a fork; columns that it did not live to tell get the reason that its last words give."""
    from tests.families.measure import reason

    with tempfile.TemporaryDirectory() as folder:
        work = multiprocessing.get_context("fork").Process(target=_work, args=(task, family, Path(folder)))
        work.start()
        work.join(LIMIT_S)
        if work.is_alive():
            work.kill()
            work.join()
        told = Path(folder, "told")
        lines = told.read_text().splitlines() if told.exists() else []
        found = {column: answer for line in lines for column, answer in json.loads(line).items()}
        said = Path(folder, "log").read_text(errors="replace")
        if work.exitcode or any(re.match("WRONG|refused: Engine", answer) for answer in found.values()):
            print(f"{family.name}: exit {work.exitcode}", *said.splitlines()[-25:], sep="\n  ", file=sys.stderr)
        if work.exitcode:
            found |= {column: reason(f"DIED {said}") for column in columns if column not in found}
        return found


def _work(task: Callable[..., None], family: Family, folder: Path) -> None:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def tell(found: Mapping[str, str]) -> None:
        with (folder / "told").open("a") as file:
            file.write(json.dumps(found) + "\n")

    task(family, folder, tell)
    os._exit(0)  # an engine's threads may not end by themselves


def page(results: Mapping[str, Mapping[str, str]]) -> str:
    """docs/families.md: the table, and the reasons below it."""
    from tests.families.measure import COLUMNS

    notes: dict[str, int] = {}
    lines = ["| family | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    for name, found in results.items():
        cells = []
        for column in COLUMNS:
            answer = found[column]
            if answer not in ("yes", "-"):
                answer = f"no [{notes.setdefault(answer, len(notes) + 1)}]"
            cells.append(answer)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    reasons = [f"{number}. {text}" for text, number in notes.items()]
    return HEAD + "\n".join(lines) + "\n\n" + "\n".join(reasons) + "\n" + FOOT


HEAD = """# Families of LLMs

`tests/families` writes this page: a tiny random model of each family goes through training and engine, in float32 on a
CPU, beside transformers alone.

The rows come from one run in November 2026, on a CPU with AVX2. Three families were measured once more: Gemma 3, whose
random model first answered with the last token alone, and Qwen3-MoE and Mixtral, whose reason came in unknown words.

- **plug trains**: each part of a plug gets a gradient; loss and gradient are those of a plain forward pass with labels.
- **replies with rows**: greedy replies with persona rows are those of transformers' `generate`. The engine is `vllm`,
  for encoder-decoders `transformers`.
- **adapters train**: the stacked trainer trains them, or refuses the base before it trains anything.
- **adapters served**: replies with an adapter are those of transformers with the adapter added to the weights.

"""
FOOT = """
A reason that begins with "refused" is a refusal before anything is trained or answered. The others are limits of vLLM
0.32 on a CPU; they say nothing about a GPU.
"""


def main(words: list[str]) -> None:
    """Measures the families that are named, or all, and writes the page when all are known."""
    kept = Path(tempfile.gettempdir()) / "pplug-families.json"
    if not words:
        kept.unlink(missing_ok=True)
    for family in sorted(FAMILIES, key=lambda one: one.name not in words):
        if words and family.name not in words and family.name in _known(kept):
            continue
        found = measured([family])
        kept.write_text(json.dumps(_known(kept) | found))
        print(family.name, found[family.name], flush=True)
    results = _known(kept)
    if all(family.name in results for family in FAMILIES):
        PAGE.write_text(page({family.name: results[family.name] for family in FAMILIES}), encoding="utf-8")


def _known(kept: Path) -> Results:
    return json.loads(kept.read_text()) if kept.exists() else {}
