import collections

import pytest

from readapt_ray.errors import InputError
from readapt_ray.serving.versions import Routing, parse_split


def test_without_a_split_the_default_searches():
    routing = Routing(default="base")
    assert {routing.choose_version(user) for user in (None, "a", "b")} == {"base"}
    assert routing.draw_shadow("base") is None


def test_a_split_gives_each_version_its_share_and_a_user_always_the_same():
    routing = Routing(default="base", split={"base": 1, "adapted": 3})
    by_lot = collections.Counter(routing.choose_version(None) for _ in range(4000))
    by_user = collections.Counter(routing.choose_version(f"user {number}") for number in range(4000))
    for counts in (by_lot, by_user):
        assert counts["adapted"] / 4000 == pytest.approx(0.75, abs=0.04)
    assert len({routing.choose_version("alice") for _ in range(50)}) == 1
    only = Routing(default="base", split={"base": 0, "adapted": 2})
    assert {only.choose_version(None) for _ in range(200)} == {"adapted"}


def test_a_shadow_gets_its_share_and_never_its_own_searches():
    routing = Routing(default="base", shadow="adapted", shadow_share=0.25)
    asked = collections.Counter(routing.draw_shadow("base") for _ in range(4000))
    assert set(asked) == {None, "adapted"}
    assert asked["adapted"] / 4000 == pytest.approx(0.25, abs=0.04)
    assert {routing.draw_shadow("adapted") for _ in range(100)} == {None}


def test_what_is_not_served_or_not_a_share_is_refused():
    for changes in ({"default": "x"}, {"shadow": "x"}, {"split": {"x": 1.0}}):
        with pytest.raises(InputError, match="names 'x', which is not served; the versions are base"):
            Routing.parse({"default": "base"} | changes).check({"base": None})
    for split in ({"base": -1.0, "b": 2.0}, {"base": 0.0}):
        with pytest.raises(InputError, match="0 or more"):
            Routing.parse({"default": "base", "split": split})
    assert parse_split(("base=0.1", "adapted=0.9")) == {"base": 0.1, "adapted": 0.9}
    with pytest.raises(InputError, match="'adapted' is not NAME=WEIGHT"):
        parse_split(("adapted",))
