from readapt_ray.records import Qrel, Query
from readapt_ray.sources.labels import repointed, with_passage


def test_judgements_move_to_the_kept_duplicate_and_the_highest_stays():
    qrels = [Qrel("q", "kept", 1), Qrel("q", "gone", 2), Qrel("p", "gone", 0), Qrel("q", "other", 0)]
    moved, num_moved = repointed(qrels, lambda doc_id: {"gone": "kept"}.get(doc_id, doc_id))
    assert moved == [Qrel("q", "kept", 2), Qrel("p", "kept", 0), Qrel("q", "other", 0)]
    assert num_moved == 2


def test_made_queries_need_a_passage_and_a_text_of_their_own():
    queries = [
        Query("q:a", "same"),
        Query("q:b", "same"),
        Query("q:c", "lone"),
        Query("q:d", "gone"),
        Query("q:e", "lone"),
    ]
    qrels = [Qrel(query.query_id, query.query_id[2:], 1) for query in queries]
    chosen, judged, left_out = with_passage(queries, qrels, lambda doc_id: doc_id not in ("d", "e"))
    assert chosen == [Query("q:c", "lone")]
    assert judged == [Qrel("q:c", "c", 1)]
    assert left_out == {"passage_dropped": 2, "ambiguous": 2}
