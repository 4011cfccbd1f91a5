"""The docstrings are the text of `--help`: what a machine can see of whether they read as sentences."""

import ast
import re
from pathlib import Path

import pytest

from pipelines.__main__ import JOBS

ROOT = Path(__file__).parents[1]


def docstrings() -> list[tuple[str, str]]:
    """Place and text of every docstring, those below fields and constants too."""
    found = []
    for package in ("pplug", "infra", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Expr)
                    and isinstance(node.value, ast.Constant)
                    and isinstance(node.value.value, str)
                ):
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node.value.value.strip()))
    return found


def test_no_docstring_begins_with_a_fragment():
    found = docstrings()
    assert len(found) > 1000
    fragment = re.compile(r"(Of|What|Who|Whose|Whether|Which|Those|How|Where)\b")
    wrong = [f"{place} {text[:60]}" for place, text in found if fragment.match(text)]
    assert not wrong, wrong


@pytest.mark.parametrize("name", list(JOBS))
def test_the_help_of_a_job_begins_with_its_name(name):
    first, *_ = (JOBS[name].config.__doc__ or "").splitlines()
    assert re.match(rf"(Job `{name}`|{name}): ", first), first
