"""The command line on a cluster: `ray job submit` carries the working tree and brings output and failure back."""

import json

from pipelines import tables

ITEMS = "user_id,item_id,timestamp,dish,taste\nann,1,2026-01-05,soup,salty\nann,2,2026-01-12,cake,sweet\n"


def test_a_submitted_command_runs_from_the_working_tree_and_its_failure_is_reported(ray_head, tmp_path):
    """Three commands of one submission: the help, results below Ray's copy of the folder, and tables that lack."""
    python = "python -m pipelines"
    lacks = f"{python} refresh --tables {tmp_path}/nowhere --run-dir {tmp_path}/run"
    script = f"{python} --help; {python} refresh --tables tables; echo ended with $?; {lacks}"
    done = ray_head.submit("bash", "-c", script)
    assert "usage: python -m pipelines <job>" in done.stdout
    assert "tables=tables: counts from the current folder" in done.stdout and "ended with 2" in done.stdout
    assert "no table histories in" in done.stdout and "run `ingest`" in done.stdout
    assert done.returncode == 1 and "exit code 2" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout


def test_a_submission_gives_its_id_to_the_run_and_does_its_work_once(ray_head, tmp_path):
    """After a failure the same work goes on under another submission id, with --run-id."""
    (tmp_path / "items.csv").write_text(ITEMS)
    (tmp_path / "task.yaml").write_text(
        "name: dishes\nitem: 'dish: {dish}'\nitem_without_label: 'dish: {dish}'\ninput: 'dish: {dish}'\n"
        "target: taste\nmetric: classification\n"
        "labels: [salty, sweet]\n"
    )
    words = ["python", "-m", "pipelines", "ingest", "--source", f"{tmp_path}/items.csv"]
    words += ["--task", f"{tmp_path}/task.yaml", "--tables", f"{tmp_path}/tables", "--run-dir", f"{tmp_path}/run"]

    def submit(submission, *more):
        given = ["--submission-id", submission, "--working-dir", ".", "--", *words, *more]
        return ray_head.ray("job", "submit", *given, timeout_s=300)

    first = submit("night-1")
    assert first.returncode == 0, first.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["run_id"], report["written"]) == ("night-1", 2)
    histories = tables.open_table(str(tmp_path / "tables"), "histories")
    assert histories.metadata_of_run("night-1") and histories.snapshot(complete=True).rows == 2
    version = histories.version

    twice = submit("night-1")
    assert twice.returncode != 0 and "already exists" in twice.stdout
    again = submit("night-1-again", "--run-id", "night-1")
    assert again.returncode == 0, again.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["run_id"], report["written"], report["already_there"]) == ("night-1", 0, 2)
    assert histories.version == version
