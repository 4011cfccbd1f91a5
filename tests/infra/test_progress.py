"""What a person reads while a step runs: lines in their time, a bar on a terminal, one line at the end."""

import io
import time

import pytest

from infra.progress import Progress, duration


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_without_a_terminal_a_line_comes_every_30_seconds_and_one_at_the_end(clock):
    out = io.StringIO()
    with Progress(4000, "users", "adapt, fit", stream=out, clock=clock) as bar:
        for second in range(1, 61):
            clock.now = 100 + second
            bar.update(50)
    # 30 s: 1,500 users, 50 in a second, 2,500 more take 50 s; 60 s: 3,000, 1,000 more take 20 s
    assert out.getvalue().splitlines() == [
        "adapt, fit: 1,500 of 4,000 users (38%), 50.0 users/s, 50 s left",
        "adapt, fit: 3,000 of 4,000 users (75%), 50.0 users/s, 20 s left",
        "adapt, fit: 3,000 of 4,000 users in 1 min 0 s (50.0 users/s)",
    ]


def test_what_an_earlier_run_has_done_counts_as_done_but_not_for_the_rate(clock):
    out = io.StringIO()
    with Progress(1000, "steps", "train", begun=900, stream=out, clock=clock) as bar:
        clock.now += 40
        bar.update(40, note="loss 0.5")
        clock.now += 60
        bar.update(60)
    assert out.getvalue().splitlines() == [
        "train: 940 of 1,000 steps (94%), 1.0 steps/s, 1 min 0 s left, loss 0.5",
        "train: 1,000 of 1,000 steps (100%), 1.0 steps/s, loss 0.5",
        "train: 1,000 of 1,000 steps in 1 min 40 s (1.0 steps/s), loss 0.5",
    ]


def test_a_step_that_counts_nothing_says_that_it_is_at_work(clock):
    out = io.StringIO()
    with Progress(None, "rows", "refresh, plan", stream=out, clock=clock) as bar:
        clock.now += 29
        bar.tick()
        clock.now += 61
        bar.tick()
    assert out.getvalue().splitlines() == ["refresh, plan: at work for 1 min 30 s", "refresh, plan: done in 1 min 30 s"]


def test_a_thread_speaks_where_nothing_is_counted_for_long():
    out = io.StringIO()
    with Progress(None, "rows", "plan", stream=out, every_s=0.02):
        until = time.monotonic() + 20
        while "at work" not in out.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    assert "plan: at work for 0." in out.getvalue()


def test_of_two_steps_inside_each_other_the_inner_one_speaks(clock):
    out = io.StringIO()
    with Progress(None, "rows", "generate, replies", stream=out, clock=clock) as outer:
        with Progress(10, "replies", stream=out, clock=clock) as inner:
            clock.now += 31
            outer.tick()
            inner.update(5)
        clock.now += 1
    assert out.getvalue().splitlines() == [
        "generate, replies: 5 of 10 replies (50%), 0.2 replies/s, 31 s left",
        "generate, replies: 5 of 10 replies in 31 s (0.2 replies/s)",
    ]


def test_a_step_that_an_error_ends_says_how_far_it_came(clock):
    out = io.StringIO()
    with pytest.raises(ValueError), Progress(10, "rows", "ingest", stream=out, clock=clock) as bar:
        bar.update(3)
        raise ValueError("words of a user")
    assert out.getvalue() == "ingest: broke off: 3 of 10 rows in 0.0 s\n"


def test_on_a_terminal_a_bar_is_drawn_and_replaced_by_the_last_line(clock):
    out = Terminal()
    with Progress(8, "buckets", "ingest, merge", stream=out, clock=clock) as bar:
        bar._bar.mininterval = 0
        for _ in range(4):
            bar.update(note="half")
            bar._bar.refresh()
    drawn, _, last = out.getvalue().rstrip("\n").rpartition("\r")
    assert "ingest, merge:  50%|" in drawn and "4/8" in drawn and "half" in drawn and "\n" not in drawn
    assert last == "ingest, merge: 4 of 8 buckets in 0.0 s, half"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7260, "2 h 1 min")],
)
def test_times_in_words(seconds, words):
    assert duration(seconds) == words
