"""Dates stay dates, whichever library changed the shared loader of YAML before."""

import subprocess
import sys

import pytest
import yaml

from pplug import yaml_text

DATES = [
    "2026-02-28",
    "2026-2-8T1:02:03",
    "2026-02-08t01:02:03.25Z",
    "2026-02-08 01:02:03 +01:30",
    "2026-02-08T01:02:03-5",
]
TEXTS = ["2026-2-8", "2026-02-08x", "2026-02-08T01:02", "26-02-08"]


def test_a_library_that_takes_dates_out_of_the_shared_loader_changes_nothing_here():
    """lm-format-enforcer does it when it is imported; with a vLLM engine it is."""
    code = (
        "import lmformatenforcer.external.jsonschemaobjectutil, yaml\n"
        "from pplug import yaml_text\n"
        f"dates = {DATES}\n"
        "assert all(isinstance(yaml.safe_load(date), str) for date in dates), 'the library leaves dates by now'\n"
        "print([yaml_text.load(text).isoformat() for text in dates])\n"
        "try:\n    yaml_text.load('limit: 2026-02-30')\n"
        "except yaml.YAMLError as error:\n    print(error.problem, error.problem_mark.column)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [
        "['2026-02-28', '2026-02-08T01:02:03', '2026-02-08T01:02:03.250000+00:00', '2026-02-08T01:02:03+01:30',"
        " '2026-02-08T01:02:03-05:00']",
        "day is out of range for month 7",
    ]


def test_digits_behind_a_zero_are_a_decimal_number_and_other_numbers_are_as_in_yaml():
    texts = {"010": 10, "-010": -10, "+017": 17, "0": 0, "0x10": 16, "0b11": 3, "1_000": 1000, "'010'": "010",
             "007a": "007a", "01.5": 1.5}  # fmt: skip
    read = yaml_text.load("\n".join(f"- {text}" for text in texts))
    assert read == list(texts.values()) and [type(value) for value in read] == [type(v) for v in texts.values()]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_date_stays_a_text(text):
    assert yaml_text.load(text) == text == yaml.load(text, Loader=yaml.BaseLoader)
