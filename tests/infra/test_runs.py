"""A run_id stands for one piece of work: the same goes on, other work is refused, whoever comes first."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from infra import runs
from infra.errors import InputError
from infra.storage import Storage


def test_the_same_goes_on_with_what_the_first_start_has_kept(place):
    assert runs.begin(place, "night", "ingest", {"file a": "1 byte"}, ["/a"], {"group": 0}) == {"group": 0}
    again = runs.begin(place, "night", "ingest", {"file a": "1 byte"}, ["/moved/a"], {"group": 5})
    assert again == {"group": 0}
    for other in (("night-2", "ingest"), ("night", "generate")):  # another run, another job
        assert runs.begin(place, *other, {"file a": "2 bytes"}, ["/a"], {"group": 1}) == {"group": 1}
    assert len(Storage(place).list(runs.FOLDER)) == 3


def test_other_work_is_refused_and_both_are_named(place):
    first = {"mode": "upsert"} | {f"file {name}": "1 byte" for name in "abcdef"}
    runs.begin(place, "night", "ingest", first, ["/first"], {})
    with pytest.raises(
        InputError,
        match=r"run night of ingest began with /first.*would read /second \(file a: 1 byte, "
        r"now not there; .*file c.*; and 5 more\).*another run_id",
    ):
        runs.begin(place, "night", "ingest", {"mode": "replace", "file z": "3 bytes"}, ["/second"], {})
    assert runs.begin(place, "night", "ingest", first, ["/first"], {}) == {}


def test_of_many_that_begin_at_once_with_other_work_one_at_most_goes_on(tmp_path):
    def begin(number: int) -> bool:
        try:
            runs.begin(str(tmp_path), "night", "ingest", {"file": str(number)}, [str(number)], {})
        except InputError:
            return False
        return True

    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            went_on = list(pool.map(begin, range(8)))
        left = Storage(str(tmp_path)).list(runs.FOLDER)
        assert len(left) == sum(went_on) <= 1
        for name in left:
            Storage(str(tmp_path)).delete(name)
