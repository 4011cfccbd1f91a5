"""The command line on a cluster: `ray job submit` carries the working tree and brings output and failure back."""


def test_a_submitted_command_runs_from_the_working_tree_and_shows_its_output(ray_head):
    done = ray_head.submit("python", "-m", "pipelines", "--help", timeout_s=120)
    assert done.returncode == 0, done.stdout
    assert "usage: python -m pipelines <job>" in done.stdout and "succeeded" in done.stdout


def test_a_submitted_job_that_fails_is_reported_as_failed_with_its_message(ray_head, tmp_path):
    done = ray_head.submit("python", "-m", "pipelines", "refresh", "--tables", str(tmp_path / "nowhere"))
    assert done.returncode == 1 and "exit code 2" in done.stdout, done.stdout
    assert "no table histories in" in done.stdout and "run `ingest`" in done.stdout
    assert "Traceback" not in done.stdout
