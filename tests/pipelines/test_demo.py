"""The verdict of the demo on its own outcome, and its sizes; `make demo` runs its jobs, tested one by one elsewhere."""

import json
from pathlib import Path

import pytest

from infra import session
from infra.errors import InputError
from pipelines import options
from pipelines.__main__ import JOBS
from pipelines.lines import demo


def report(oracle: float) -> dict:
    return {"methods": {"oracle": {"scores": {"accuracy": oracle}}}, "reference": {"best_with_history": 0.98}}


def test_a_base_lm_that_cannot_use_a_stated_preference_is_a_failure():
    assert demo.weakness(report(0.95)) is None
    assert "accuracy 0.659, possible 0.980" in (demo.weakness(report(0.659)) or "")


def test_the_commands_it_runs_are_ones_that_the_command_line_takes(tmp_path):
    names = ("task", "truth", "oracle", "adapter-users", "corpus/histories", "train/histories", "train/requests",
             "test/histories", "test/requests")  # fmt: skip
    commands = demo._line(demo.Config(), tmp_path, {name: str(tmp_path / name) for name in names})
    assert [words[0] for words in commands] == [
        "ingest", "base-lm", "ingest", "refresh", "train", "ingest", "refresh", "adapt", "generate",
        "evaluate", "evaluate",
    ]  # fmt: skip
    for job, *words in commands:
        config = JOBS[job].config
        options.check(config, options.read(words, config))


@pytest.mark.parametrize(
    ("told", "failing", "code", "says"),
    [
        (0.95, None, 0, ""),
        (0.66, None, 1, "did not learn to use a preference that its prompt states (accuracy 0.660, possible 0.980)"),
        (0.95, "train", 3, "demo: train ended with exit code 3; a new demo empties "),
    ],
)
def test_it_runs_its_jobs_on_the_files_that_it_writes(told, failing, code, says, tmp_path, monkeypatch, capsys):
    """The jobs themselves are left out: each is held to the files that its command names."""
    root, ran = tmp_path / "run", []

    def job(words: list[str]) -> int:
        ran.append(words[0])
        named = dict(zip(words[1:], words[2:], strict=False))
        for key in ("--source", "--requests-source", "--task", "--users", "--oracle", "--reference"):
            assert key not in named or Path(named[key]).stat().st_size
        (root / "report.json").write_text(json.dumps(report(told)))
        return 3 if words[0] == failing else 0

    monkeypatch.setattr(demo, "_job", job)
    monkeypatch.setattr(session, "start", lambda **given: None)
    sizes = {"train_users": 2, "test_users": 2, "adapter_users": 2, "corpus_users": 2}
    assert demo.run(demo.Config(run_dir=str(root), **sizes)) == code
    shown = capsys.readouterr()
    assert (
        says in shown.err
        and ("demo done in" in shown.out) == (code == 0)
        and ("demo ended in" in shown.out) == (code == 1)
    )
    assert ran[-1] == (failing or "evaluate") and len(ran) == (5 if failing else 11)
    assert len((root / "world" / "adapter-users.txt").read_text().split()) == 2


def test_a_quick_demo_has_fewer_people_wherever_no_number_was_given():
    full, quick, given = (
        demo.Config(**values).sized() for values in ({}, {"quick": True}, {"quick": True, "test_users": 399})
    )
    assert (quick.train_users, quick.test_users, quick.adapter_users) < (
        full.train_users,
        full.test_users,
        full.adapter_users,
    )
    assert given.test_users == 399 and given.train_users == quick.train_users and quick.seed == full.seed
    assert full == demo.Config()


def test_a_folder_that_no_demo_made_is_left_as_it_is(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("a year's work")
    with pytest.raises(InputError, match="was not made by a demo; give another --run-dir or remove it"):
        demo._fresh(tmp_path)
    assert mine.read_text() == "a year's work" and list(tmp_path.iterdir()) == [mine]


def test_what_an_earlier_demo_left_goes_and_what_it_links_to_stays(tmp_path):
    root, elsewhere = tmp_path / "demo", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("a year's work")
    assert demo._fresh(root) == root  # the first demo there
    (root / "tables" / "test").mkdir(parents=True)
    (root / "tables" / "test" / "a.parquet").write_text("rows")
    (root / "report.json").write_text("{}")
    (root / "link").symlink_to(elsewhere)
    demo._fresh(root)
    assert [path.name for path in root.iterdir()] == [".pplug-demo"]
    assert (elsewhere / "mine.txt").read_text() == "a year's work"
