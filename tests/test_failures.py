"""Words for an error that ends a job: its kind, what to do about it, and its place; never the words of a user."""

import re

import pytest
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import ActorDiedError, RayTaskError

from infra.errors import InputError
from infra.storage import Storage
from pipelines import failures


class Own(ValueError):
    pass


def in_a_worker(error: Exception) -> Exception:
    return RayTaskError("work", "remote traceback", error).as_instanceof_cause()


IN_A_STAGE = """ray::Map(f)
  File "x.py", line 1
torch.OutOfMemoryError: words of a user
more of them

The above exception was the direct cause of the following exception:

ray.exceptions.UserCodeException: ray::Map(f)"""


@pytest.mark.parametrize(
    ("error", "kind", "advice"),
    [
        (MemoryError(), "MemoryError", "memory ran out"),
        (in_a_worker(Own("text")), "Own", "fault of the program"),
        (in_a_worker(TimeoutError("text")), "TimeoutError", "did not answer"),
        (ExecutionTimeoutError("text"), "ExecutionTimeoutError", "no rows have come for a day"),
        (RuntimeError(IN_A_STAGE), "OutOfMemoryError", "memory ran out"),
        (PermissionError(13, "Permission denied"), "PermissionError", "rights and the credentials"),
        (ModuleNotFoundError("No module named 'vllm'"), "ModuleNotFoundError", "a library is missing"),
        (FileNotFoundError(2, "No such file", "x"), "FileNotFoundError", "a file is missing"),
        (ActorDiedError(), "ActorDiedError", "a worker process died"),
    ],
)
def test_the_kind_of_an_error_and_what_to_do_about_it(error, kind, advice):
    assert failures.kind(error) == kind and advice in failures.advice(error)


OF_OURS = """ray::Map(f)
  File "/tmp/ray/working_dir/infra/snapshot.py", line 194, in _read
    return retrying(action)
           ^^^^^^^^^^^^^^^^
pyarrow.lib.ArrowInvalid: words of a library

The above exception was the direct cause of the following exception:

ray::Map(f)
  File "/tmp/ray/working_dir/infra/snapshot.py", line 197, in _read
    raise ValueError(f"{uri}: not readable")
    ^^^^^^^^^^^^
ValueError: t/x.parquet: not readable; restore it

The above exception was the direct cause of the following exception:

ray.exceptions.UserCodeException: ray::Map(f)"""


def test_words_that_our_own_code_raised_are_shown_and_a_librarys_are_not(tmp_path):
    with pytest.raises(ValueError) as ours:
        Storage(str(tmp_path)).write_bytes("../out", b"")
    got = failures.own_words(ours.value)
    assert str(ours.value) in got and re.search(r" \(\w+ at infra/storage\.py:\d+\)$", got)
    with pytest.raises(OSError) as theirs:
        Storage(str(tmp_path)).read_bytes("none")
    assert failures.own_words(theirs.value) == "" == failures.own_words(ValueError("words of a user"))
    assert failures.own_words(RuntimeError(IN_A_STAGE)) == ""
    assert failures.own_words(RuntimeError(OF_OURS)) == (
        "t/x.parquet: not readable; restore it (ValueError at infra/snapshot.py:197)"
    )


def test_the_place_of_an_error_is_the_last_line_of_our_own(tmp_path):
    with pytest.raises(OSError) as caught:
        Storage(str(tmp_path)).read_bytes("none")
    assert re.fullmatch(r"infra/storage\.py:\d+", failures.place(caught.value))
    assert failures.place(ValueError()) == ""


RAYS_NOTE = """
Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).
To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext.get_current()`"""


def test_what_a_worker_refuses_leaves_a_job_in_its_own_words_alone():
    words = "t/a.csv: two\nlines; mend it"
    in_text = IN_A_STAGE.replace("torch.OutOfMemoryError: words of a user\nmore of them", words)
    for error in (
        InputError(words),
        in_a_worker(InputError(words + RAYS_NOTE)),
        RuntimeError(in_text.replace(words, f"infra.errors.InputError: {words}{RAYS_NOTE}")),
    ):

        @failures.plain_refusals
        def run(number: int) -> int:
            raise error  # noqa: B023

        with pytest.raises(InputError) as met:
            run(1)
        assert str(met.value) == words
    for inner in (InputError(words), in_a_worker(InputError(words))):
        named = InputError(f"plug: {words}")  # as a job names the key that the words are about
        named.__cause__ = inner
        assert str(failures.input_error(named)) == f"plug: {words}"
    with pytest.raises(OSError, match="of a library"):
        failures.plain_refusals(fails)()
    assert failures.plain_refusals(len)("abc") == 3


def fails() -> None:
    raise OSError("words of a library")
