"""What is drawn by a hash, and the schedule: the literals were computed by the code before it had one home."""

import hashlib

import pytest

from pplug.controls import drawn_for
from pplug.fit_config import held_out
from pplug.identity import stable_int
from pplug.lora import user_seed
from pplug.retrieval import at_random
from pplug.schedule import rate


def test_draws_are_those_of_before():
    """Another draw would change runs that are repeated, and who is held out of a training that goes on."""
    assert at_random(10, 3, "k").tolist() == [6, 5, 4]
    assert at_random(50, 4, "ann\ud800").tolist() == [46, 12, 47, 4]
    assert [held_out(f"u{i}", 0.3, 5) for i in range(8)] == [False, True, True, False, True, True, False, False]
    assert user_seed(7, "ann") == 2391274231557072746
    assert [drawn_for(owner, "abcdefg") for owner in ("ann", "bob", "cy\ud800")] == ["d", "d", "b"]


def test_a_stable_int_is_the_first_64_bits_of_the_hash():
    assert f"{stable_int('ann'):016x}" == hashlib.blake2b(b"ann", digest_size=8).hexdigest()


def test_the_rate_rises_over_the_warm_up_and_falls_to_zero():
    """Ten steps, a warm-up of a quarter (2.5 steps, which rounds to 2): halves up, then eighths down."""
    got = [rate(step, 10, 0.25) for step in range(11)]
    assert got == pytest.approx([1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    assert rate(0, 10, 0.0) == 1  # without a warm-up the first step has the full rate
