"""The list of planted faults follows the code: each line that it would change stands there once."""

from pathlib import Path

import pytest

from tests.faults.plant import FAULTS, ROOT


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_has_its_line_and_its_test(name):
    fault = FAULTS[name]
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.line) == 1
    path, _, function = fault.test.partition("::")
    test = Path(ROOT / path).read_text(encoding="utf-8")
    assert f"def {function}" in test
