"""The runner: turns, medians, verdicts, the tables it writes."""

import json

import pytest

from tests.benchmarks import measure
from tests.benchmarks.measure import Line, between, in_turn, write_readme


def test_sides_take_turns():
    calls: list[str] = []
    found = in_turn({name: lambda name=name: calls.append(name) or float(len(calls)) for name in "ab"}, 3)
    assert calls == list("ababab")
    assert found == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}


@pytest.mark.parametrize(
    ("ours", "limits", "verdict"),
    [
        ([3.0, 1.0, 2.0], {"least": 2.5}, "MISSED by 20%"),
        ([3.0, 1.0, 2.0], {"least": 2.0}, "met"),
        ([3.0, 1.0, 2.0], {"least": 1.5, "aim": 2.5}, "met"),
        ([3.0, 1.0, 2.0], {"least": 1.5, "aim": 2.0}, "aim met"),
        ([3.0, 1.0, 2.0], {"most": 1.0}, "MISSED by 100%"),
        ([0.5], {"most": 1.0}, "met"),
        ([0.5], {}, ""),
    ],
)
def test_a_verdict_follows_from_the_medians(ours, limits, verdict):
    line = Line("it", "a peer", "items/s", ours, [1.0] * len(ours), **limits)
    assert line.verdict == verdict


def test_a_spread_is_that_of_the_rounds():
    line = Line("it", "a peer", "items/s", [10.0, 30.0, 20.0], [10.0, 10.0, 5.0])
    assert line.ratio == 2.0
    assert line.spread == (1.0, 4.0)


def test_the_readme_shows_the_newest_result_of_each_machine(tmp_path):
    machine = {"cpu": "Some CPU", "cores": 2, "matrix_instructions": "avx2", "memory_gib": 16, "gpu": None,
               "load_before": 0.1}  # fmt: skip
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\n<!-- profile -->\n<!-- /profile -->\nafter\n")
    line = Line("it", "a peer", "items/s", [4.0], [2.0], least=3.0).to_dict()
    path = measure.save("encode", {"lines": [line], "config": {"items": 7}, "rounds": 1}, machine, tmp_path)
    assert path.name.startswith("encode_2x-some-cpu-avx2_")
    older = json.loads(path.read_text()) | {"date": "2000-01-01", "lines": []}
    path.with_name("encode_2x-some-cpu-avx2_2000-01-01.json").write_text(json.dumps(older))
    shares = {"tables": [{"title": "a path (2.0 s)", "shares": {"products": 75.0, "the rest": 25.0}}]}
    measure.save("profile-encode", shares, machine, tmp_path)
    write_readme(["encode"], readme, tmp_path)
    text = readme.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert "| it, items/s | 4 | a peer | 2 | 2.00 (2.00 to 2.00) | at least 3 | MISSED by 33% |" in text
    assert "items 7" in text and "| products | 75.0% |" in text
    again = text
    write_readme(["encode"], readme, tmp_path)
    assert readme.read_text() == again


def test_marks_that_are_missing_are_named():
    with pytest.raises(ValueError, match="<!-- results -->"):
        between("no marks", "results", "x")
