import numpy as np

from readapt_ray.retrieval.id_lookup import IdLookup


def test_each_doc_id_has_its_value_and_others_have_none():
    names = [f"d{number}" for number in range(1000)]
    lookup = IdLookup.build(names, np.arange(1000, dtype=np.uint64))
    values, found = lookup.find(["d7", "absent", "d999", "d0", ""])
    assert values.tolist() == [7, 0, 999, 0, 0]
    assert found.tolist() == [True, False, True, True, False]


def test_an_empty_one_has_none():
    empty = IdLookup.build([], np.zeros(0, np.uint64))
    assert empty.find(["a"])[1].tolist() == [False]
    assert empty.find([])[0].tolist() == []
