"""The bootstrap over people against the textbook one, drawn resample by resample."""

import numpy as np
import pytest

from pplug import intervals


def test_weights_are_poisson_one_and_independent_between_people_and_resamples():
    drawn = intervals.weights([f"u{i}" for i in range(500)], 2000, seed=0).astype(float)
    share = [(drawn == k).mean() for k in range(4)]
    np.testing.assert_allclose(share, [0.3679, 0.3679, 0.1839, 0.0613], atol=0.002)
    assert drawn.var() == pytest.approx(1, abs=0.01)
    for one, other in ((drawn[0], drawn[1]), (drawn[:, 0], drawn[:, 1]), (drawn[:-1].ravel(), drawn[1:].ravel())):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(len(one))


def test_weights_depend_on_seed_and_owner_alone():
    both = intervals.weights(["a", "b"], 50, seed=1)
    assert np.array_equal(intervals.weights(["b"], 50, seed=1)[0], both[1])
    assert not np.array_equal(intervals.weights(["a"], 50, seed=2)[0], both[0])


def test_sums_of_parts_add_up_and_an_owner_counts_as_a_whole():
    rng = np.random.default_rng(0)
    owners = [f"u{i}" for i in rng.integers(0, 20, 100)]
    sums = rng.random((100, 3))
    whole = intervals.resampled_sums(owners, sums, 200, seed=3)
    parts = [intervals.resampled_sums(owners[cut], sums[cut], 200, seed=3) for cut in (slice(0, 40), slice(40, 100))]
    np.testing.assert_allclose(whole, parts[0] + parts[1])
    weight = {owner: intervals.weights([owner], 200, 3)[0] for owner in set(owners)}
    by_hand = sum(np.outer(weight[owner], row) for owner, row in zip(owners, sums, strict=True))
    np.testing.assert_allclose(whole, by_hand)


def test_intervals_agree_with_the_textbook_bootstrap_over_people():
    rng = np.random.default_rng(1)
    people, each = 150, 5
    level = rng.beta(4, 4, people)
    hits = rng.random((people, each)) < level[:, None]
    owners = np.repeat([f"u{i}" for i in range(people)], each)
    sums = np.stack([np.ones(people * each), hits.ravel()], axis=1).astype(float)
    drawn = intervals.resampled_sums(owners.tolist(), sums, 4000, seed=0)
    low, high = intervals.ci95(drawn[:, 1] / drawn[:, 0])
    textbook = [hits[rng.integers(0, people, people)].mean() for _ in range(4000)]
    want = np.percentile(textbook, [2.5, 97.5])
    np.testing.assert_allclose([low, high], want, atol=0.1 * (want[1] - want[0]))


def test_a_95_percent_interval_holds_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(2)
    inside = 0
    for trial in range(200):
        values = rng.exponential(1.0, 100)
        drawn = intervals.resampled_sums(
            [f"{trial}/{i}" for i in range(100)], np.stack([np.ones(100), values], 1), 500, trial
        )
        low, high = intervals.ci95(drawn[:, 1] / drawn[:, 0])
        inside += low <= 1.0 <= high
    assert 178 <= inside <= 198  # 200 draws of .92 to .95 (a skewed law covers a little less)


def normal(rng, people: int, methods: int, shared: float) -> np.ndarray:
    """(people, methods) without any true mean; the methods have this share of their variance in common."""
    return np.sqrt(shared) * rng.normal(size=(people, 1)) + np.sqrt(1 - shared) * rng.normal(size=(people, methods))


@pytest.mark.parametrize(("people", "methods", "shared"), [(12, 3, 0.0), (40, 10, 0.0), (150, 10, 0.8), (150, 1, 0.0)])
def test_simultaneous_intervals_leave_out_any_truth_in_2_5_percent_of_cases_at_each_end(people, methods, shared):
    rng, trials = np.random.default_rng(4), 1000
    weights = intervals.weights([f"u{i}" for i in range(people)], 400, seed=0).astype(float)
    count = weights.sum(axis=0)[:, None]
    above = below = apart = 0
    for _ in range(trials):
        values = normal(rng, people, methods, shared)
        drawn = weights.T @ values / count
        ends = intervals.simultaneous(values.mean(axis=0), drawn, people)
        above += (ends[:, 0] > 0).any()
        below += (ends[:, 1] < 0).any()
        apart += (np.percentile(drawn, 2.5, axis=0) > 0).any()
    # 25 of 1000 are right; 3.3 standard deviations of chance are left on top, and it must not be far too wide either
    assert max(above, below) <= 42 and above + below >= 15
    assert methods == 1 or shared or apart > 60  # one by one, the best of several looks good far too often


def test_a_single_simultaneous_interval_is_about_the_percentile_one():
    rng = np.random.default_rng(5)
    values = rng.exponential(1.0, 400)
    sums = np.stack([np.ones(400), values], 1)
    drawn = intervals.resampled_sums([f"u{i}" for i in range(400)], sums, 4000, 0)
    means = drawn[:, 1] / drawn[:, 0]
    (got,) = intervals.simultaneous(np.array([values.mean()]), means[:, None], 400)
    low, high = intervals.ci95(means)
    np.testing.assert_allclose(got, [low, high], atol=0.06 * (high - low))


def test_equal_methods_widen_nothing_and_resamples_without_anyone_are_left_out():
    rng = np.random.default_rng(6)
    one = rng.normal(0.3, 0.1, (2000, 1))
    alone = intervals.simultaneous(np.array([0.3]), one, 50)
    beside = intervals.simultaneous(np.array([0.3, 0.3, 0.0]), np.hstack([one, one, np.zeros((2000, 1))]), 50)
    np.testing.assert_allclose(beside, [alone[0], alone[0], [0, 0]])
    np.testing.assert_allclose(
        intervals.simultaneous(np.array([0.3]), np.vstack([one, [[np.nan]]]), 50), alone)  # fmt: skip
    assert np.isnan(intervals.simultaneous(np.array([0.3]), np.array([[np.nan]]), 50)).all()
    assert intervals.simultaneous(np.zeros(0), np.zeros((10, 0)), 50).shape == (0, 2)


def test_p_values():
    assert intervals.p_value(np.full(1999, 0.5), 30) == pytest.approx(2 / 2000)
    assert intervals.p_value(np.tile([-1.0, 1.0], 1000), 30) == 1.0
    assert intervals.p_value(np.zeros(100), 30) == 1.0  # two equal methods
    assert intervals.p_value(np.r_[np.full(1900, 1.0), np.full(99, -1.0)], 30) == pytest.approx(2 * 100 / 2000)
    assert intervals.p_value(np.full(1999, 0.5), 6) == pytest.approx(2 / 2000)
    assert intervals.p_value(np.full(1999, 0.5), 5) is None  # all five gain by chance in 1 of 32 cases


def test_nobody_gives_no_interval():
    assert np.isnan(intervals.ci95(np.array([np.nan, np.nan]))).all()
