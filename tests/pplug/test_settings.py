"""A renamed key: its old name works in Python, is warned of once, and is refused beside the new one."""

import logging

import pytest
from pydantic import ValidationError

from pplug import settings
from pplug.settings import Settings, added, renamed


class Inner(Settings):
    max_grad_norm: float = renamed("clip", 1.0, gt=0)


class Outer(Settings):
    name: str = "x"
    inner: Inner = Inner()
    max_items: int = renamed("cap", 5, gt=0)


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(settings, "_warned", set())


def test_the_old_name_gives_the_same_config_and_one_warning(caplog):
    with caplog.at_level(logging.WARNING):
        old = Outer(cap=7, inner={"clip": 0.5})
        Outer(cap=8)
    assert old == Outer(max_items=7, inner=Inner(max_grad_norm=0.5))
    told = sorted(record.getMessage() for record in caplog.records)
    assert [text.partition(";")[0] for text in told] == [
        "the key cap is now called max_items",
        "the key clip is now called max_grad_norm",
    ]


def test_the_new_name_is_not_warned_of(caplog):
    assert Outer(max_items=7).max_items == 7
    assert not caplog.records


def test_both_names_are_refused_and_both_are_named():
    with pytest.raises(ValidationError, match="cap and max_items are two names of one key"):
        Outer(cap=7, max_items=7)


def test_a_wrong_value_under_the_old_name_is_refused():
    with pytest.raises(ValidationError, match="greater than 0"):
        Outer(cap=0)


def test_decisive_has_the_names_of_before_and_a_plain_dump_the_present_ones():
    config = Outer(max_items=7)
    assert config.decisive() == {"name": "x", "inner": {"clip": 1.0}, "cap": 7}
    assert config.decisive(exclude={"max_items"}) == {"name": "x", "inner": {"clip": 1.0}}
    assert config.model_dump() == {"name": "x", "inner": {"max_grad_norm": 1.0}, "max_items": 7}


def test_a_config_is_frozen_and_refuses_unknown_keys():
    with pytest.raises(ValidationError, match="Extra inputs"):
        Outer(colour="red")
    with pytest.raises(ValidationError, match="frozen"):
        Outer().name = "y"


def test_a_field_that_came_later_counts_where_it_is_given():
    class Later(Settings):
        size: int = 1
        tags: dict[str, int] = added({})
        limit: int | None = added(None, gt=0)

    class Whole(Settings):
        name: str = "x"
        part: Later = Later()

    assert Whole().decisive() == {"name": "x", "part": {"size": 1}}
    given = Whole(part=Later(tags={"a": 1}, limit=3))
    assert given.decisive() == {"name": "x", "part": {"size": 1, "tags": {"a": 1}, "limit": 3}}
    assert given.decisive(exclude={"part": {"tags"}}) == {"name": "x", "part": {"size": 1, "limit": 3}}
    assert Later(tags={}).decisive() == {"size": 1}
    with pytest.raises(ValidationError):
        Later(limit=0)
