"""The rules of a history, against the definition spelled out item by item."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from pplug import history, tasks

SECOND = 1_000_000


def test_text_hash_depends_on_names_and_values_and_not_on_order():
    one = history.text_hash({"title": "a", "text": "b"})
    assert one == history.text_hash({"text": "b", "title": "a"})
    others = [
        {"title": "b", "text": "a"},
        {"title": "a"},
        {"title": "a", "text": "b", "x": ""},
        {"title": 'a","text":"b'},
    ]
    assert len({one, *(history.text_hash(fields) for fields in others)}) == 5
    assert len(one) == 32


def test_text_hash_is_the_same_in_every_release():
    """Embeddings are stored under it: a silent change would encode every text anew."""
    assert history.text_hash({"title": "Ünï", "text": "a\n\x00"}) == "e046371d6d26821630cb7ce2bd5d45e5"


def test_text_hash_takes_any_character():
    assert (
        len({history.text_hash({"text": text}) for text in ("", "\x00", "\ud800", "😀", "\u2028", "a" * 10_000_000)})
        == 6
    )


def test_item_text_with_and_without_its_label():
    fields = {"tag": "comedy", "description": "{tag} a clown "}
    entry = tasks.get("LaMP_2")
    assert history.item_text(fields, entry) == "comedy: {tag} a clown"  # braces in a user's text mean nothing
    assert history.item_text(fields, entry, with_label=False) == "{tag} a clown"


def test_item_without_a_needed_field_is_named():
    with pytest.raises(ValueError, match="task LaMP_2.*needs the field 'tag'.*only description"):
        history.item_text({"description": "x"}, tasks.get("LaMP_2"))


def test_order_is_by_time_then_position_and_by_position_alone_without_times():
    position = np.array([2, 0, 1, 3])
    assert history.order(np.array([5, 9, 5, 1]), position).tolist() == [3, 2, 0, 1]
    assert history.order(None, position).tolist() == [1, 2, 0, 3]


def test_times_are_microseconds_and_one_missing_time_makes_the_user_untimed():
    times = pa.array([1, 2], pa.timestamp("s", tz="UTC"))
    assert history.times_us(times).tolist() == [SECOND, 2 * SECOND]
    assert history.times_us(pa.array([1, None], pa.timestamp("us", tz="UTC"))) is None


def counts_by_definition(times, positions, as_of, as_of_position) -> set[int]:
    """Indices of the items that count, straight from the words of docs/structure.md on the cut-off."""
    everything = set(range(len(positions)))
    if as_of is None and as_of_position is None:
        return everything
    if as_of is not None and times is not None:
        border = (as_of, -1 if as_of_position is None else as_of_position)
        return {i for i in everything if (times[i], positions[i]) < border}
    if as_of_position is None:
        return set()
    return {i for i in everything if positions[i] < as_of_position}


@pytest.mark.parametrize("timed", [True, False])
def test_visible_items_are_the_prefix_that_the_rule_defines(timed):
    rng = np.random.default_rng(0)
    for n, as_of, as_of_position in itertools.product((0, 1, 7), (None, 0, 2, 3, 9), (None, 0, 3, 99)):
        positions = rng.permutation(n)
        times = rng.integers(0, 4, n) if timed else None
        ranks = history.order(times, positions)
        sorted_times = times[ranks] if timed else None
        count = history.visible_count(sorted_times, positions[ranks], as_of, as_of_position)
        got, want = set(ranks[:count].tolist()), counts_by_definition(times, positions, as_of, as_of_position)
        if timed and as_of is None and as_of_position is not None:
            assert got <= want  # a position alone over a timed history: never a leak, perhaps fewer
        else:
            assert got == want


def test_later_items_change_nothing_for_an_earlier_request():
    times, positions = np.array([10, 20, 30]), np.array([0, 1, 2])
    before = history.visible_count(times, positions, 20, 1)
    later = history.visible_count(np.append(times, [40, 50]), np.append(positions, [3, 4]), 20, 1)
    assert before == later == 1


def test_an_item_given_late_with_an_early_time_is_sorted_in_by_its_time():
    times, positions = np.array([10, 20, 15]), np.array([0, 1, 2])
    ranks = history.order(times, positions)
    assert ranks.tolist() == [0, 2, 1]
    assert history.visible_count(times[ranks], positions[ranks], 20, None) == 2


def test_the_cap_keeps_the_newest():
    assert list(range(10))[history.newest(7, cap=3)] == [4, 5, 6]
    assert list(range(10))[history.newest(2, cap=3)] == [0, 1]
    assert list(range(10))[history.newest(0, cap=3)] == []


def test_history_hash_changes_with_items_and_with_their_order():
    a, b = history.text_hash({"t": "a"}), history.text_hash({"t": "b"})
    hashes = {history.history_hash(one) for one in ([], [a], [a, b], [b, a], [a, a])}
    assert len(hashes) == 5
    assert history.history_hash([a, b]) == history.history_hash(iter([a, b]))


def test_history_hash_covers_times_where_they_are_given_and_many_users_hash_as_one_does():
    hashes = [history.text_hash({"t": str(i)}) for i in range(6)]
    times = np.array([-5, 0, 1_761_234_567_890_123, history.NO_TIME, 7, np.iinfo(np.int64).max])
    starts, stops = np.array([0, 3, 3]), np.array([3, 3, 6])
    for given in (None, times):
        together = history.history_hashes(pa.array(hashes), starts, stops, given)
        alone = [
            history.history_hash(hashes[start:stop], None if given is None else given[start:stop].tolist())
            for start, stop in zip(starts, stops, strict=True)
        ]
        assert together == alone
    later = [history.history_hash(hashes[:2], moved) for moved in ([1, 2], [1, 3], [2, 2])]
    assert len({*later, history.history_hash(hashes[:2])}) == 4


def test_ages_are_days_before_the_reference_and_never_negative():
    times = np.array([history.NO_TIME, 0, 43_200_000_000, 86_400_000_001])
    assert history.age_days(times, 86_400_000_000).tolist() == [0.0, 1.0, 0.5, 0.0]
    assert history.age_days(times, np.array([5, 86_400_000_000, history.NO_TIME, 0])).tolist() == [0.0, 1.0, 0.0, 0.0]
    assert history.age_days(times[:0], history.NO_TIME).dtype == np.float32


def test_one_item_is_visible_as_it_is_among_others():
    rng = np.random.default_rng(0)
    for _ in range(300):
        times = np.sort(rng.integers(0, 5, 6)) if rng.random() < 0.7 else None
        position = np.arange(6)
        as_of = None if rng.random() < 0.3 else int(rng.integers(0, 6))
        at = None if rng.random() < 0.5 else int(rng.integers(0, 7))
        alone = [history.is_visible(None if times is None else int(times[i]), i, as_of, at) for i in range(6)]
        assert sum(alone) == history.visible_count(times, position, as_of, at)


def test_the_hash_of_a_request_covers_its_cut_off_and_that_there_is_none():
    assert history.input_hash("How?") == "46774fa1f90cb4d6"  # of the input alone, as every release has written it
    hashes = {history.input_hash("How?", (at, place)) for at in (None, 0, 7) for place in (None, 0, 7)}
    assert len(hashes) == 9 and "46774fa1f90cb4d6" not in hashes
