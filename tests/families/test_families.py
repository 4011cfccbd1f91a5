"""The table of LLM families in docs/families.md is what is measured, and no family is silently wrong."""

import pytest

from tests.families.models import FAMILIES
from tests.families.table import PAGE, measured, page

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def test_the_table_is_what_is_measured_and_nothing_in_it_is_wrong():
    results = measured(FAMILIES)
    wrong = {name: found for name, found in results.items() if any("WRONG" in answer for answer in found.values())}
    assert not wrong
    assert [found["plug trains"] for found in results.values()] == ["yes"] * len(FAMILIES)
    assert page(results) == PAGE.read_text(encoding="utf-8"), "run `python -m tests.families` and look at what changed"
