import random

from readapt_ray.records import Passage
from readapt_ray.sources.duplicates import RowTable, digest, duplicate_finder


def _finder(mode, **changes):
    return duplicate_finder(mode, **({"near_threshold": 0.8, "title_tells_apart": True} | changes))


def test_row_table_equals_a_dict():
    numbers = random.Random(0)
    table, oracle = RowTable(), {}
    for _ in range(20_000):
        key = str(numbers.randrange(9_000))
        assert table.get(digest(key)) == oracle.get(key)
        oracle[key] = numbers.randrange(10**12)
        table.put(digest(key), oracle[key])
    assert len(table) == len(oracle)
    assert all(table.get(digest(key)) == value for key, value in oracle.items())


def test_row_table_tells_apart_digests_that_are_half_alike():
    table = RowTable()
    numbers = [number.to_bytes(8, "little") for number in range(1, 1000)]
    keys = [*(bytes(8) + each for each in numbers), *(each + bytes(8) for each in numbers)]
    for number, key in enumerate(keys):
        table.put(key, number)
    assert [table.get(key) for key in keys] == list(range(len(keys)))


def test_exact_finds_the_first_of_equal_title_and_text():
    earlier = _finder("exact")
    passages = [Passage("a", "t", "x"), Passage("b", "t", "y"), Passage("c", "t", "x"), Passage("d", "", "tx")]
    assert [earlier(passage, row) for row, passage in enumerate(passages)] == [None, None, 0, None]


def test_title_may_be_left_out_of_what_tells_apart():
    earlier = _finder("exact", title_tells_apart=False)
    assert earlier(Passage("a", "t", "x"), 0) is None
    assert earlier(Passage("b", "u", "x"), 1) == 0


def test_none_finds_nothing():
    earlier = _finder("none")
    assert [earlier(Passage("a", "t", "x"), row) for row in range(3)] == [None] * 3


def test_near_finds_a_changed_word_and_not_another_text():
    words = [f"word{number}" for number in range(200)]
    changed = [*words[:99], "other", "words", "here", *words[102:]]
    shuffled = random.Random(1).sample(words, len(words))
    earlier = _finder("near")
    texts = [words, changed, shuffled, words]
    assert [earlier(Passage(str(row), "", " ".join(t)), row) for row, t in enumerate(texts)] == [None, 0, None, 0]
    strict = _finder("near", near_threshold=0.95)
    assert [strict(Passage(str(row), "", " ".join(t)), row) for row, t in enumerate(texts[:2])] == [None, None]


def test_a_repeat_of_a_near_duplicate_stands_for_the_passage_that_was_kept():
    words = [f"word{number}" for number in range(200)]
    near, other = " ".join([*words[:-1], "end"]), " ".join(words[::-1])
    earlier = _finder("near")
    kept: list[str] = []
    found = []
    for text in (" ".join(words), near, other, near):
        found.append(earlier(Passage(text, "", text), len(kept)))
        kept += [text] * (found[-1] is None)
    assert found == [None, 0, None, 0]


def test_near_works_on_text_without_spaces():
    text = "".join(chr(0x4E00 + number) for number in range(200))
    earlier = _finder("near")
    assert earlier(Passage("a", "", text), 0) is None
    assert earlier(Passage("b", "", text[:-1]), 1) == 0
    assert earlier(Passage("c", "", text[::-1]), 2) is None
    assert earlier(Passage("d", "", "!"), 3) is None
