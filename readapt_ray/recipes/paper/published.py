"""List published numbers, to print beside ours.

Sources: the tables of the paper (RE-AdaptIR, arXiv 2406.14764, nDCG@10 times 100), and scores of the unchanged models in
the repository embeddings-benchmark/results. The paper's base scores of E5-Mistral are lower than those of the repository;
the paper does not say why. So a gain is always shown with both.
"""

from typing import NamedTuple


class PaperScores(NamedTuple):
    """One retriever's numbers in a row of Table 1: nDCG@10 times 100 before and after RE-AdaptIR."""

    base: float
    readapted: float


_TABLE_1: dict[str, tuple[PaperScores, PaperScores]] = {
    name: (PaperScores(*row[:2]), PaperScores(*row[2:]))
    for name, row in {
        "msmarco": (46.5, 46.1, 36.5, 40.1),
        "fever": (84.0, 83.8, 85.1, 87.7),
        "hotpotqa": (67.2, 67.6, 72.5, 73.4),
        "nq": (61.8, 62.1, 53.3, 52.4),
        "quora": (80.1, 82.8, 85.6, 88.0),
        "arguana": (52.3, 52.6, 52.0, 59.0),
        "climate-fever": (30.8, 30.4, 24.9, 31.4),
        "dbpedia-entity": (43.4, 43.5, 47.2, 47.1),
        "fiqa": (44.2, 45.5, 49.9, 52.3),
        "nfcorpus": (38.0, 38.6, 39.6, 40.8),
        "scidocs": (17.7, 18.3, 18.6, 18.7),
        "scifact": (74.5, 76.3, 71.4, 73.3),
        "trec-covid": (84.0, 85.6, 83.9, 81.0),
        "webis-touche2020": (27.5, 27.0, 29.0, 30.1),
    }.items()
}
_PAPER_RETRIEVERS = ("repllama", "e5-mistral")

_TABLE_2: dict[str, dict[str, tuple[float, float, float]]] = {
    "repllama": {
        "arguana": (0.5, 0.2, 0.3),
        "fiqa": (1.0, 1.2, 1.3),
        "nfcorpus": (0.3, 0.5, 0.6),
        "scifact": (0.1, 0.5, 1.8),
    },
    "e5-mistral": {
        "arguana": (3.9, 5.1, 7.0),
        "fiqa": (2.0, 2.8, 2.4),
        "nfcorpus": (0.6, 1.1, 1.2),
        "scifact": (2.3, 1.0, 1.9),
    },
}
_TABLE_2_ARMS = ("unjudged passages", "judged passages", "readapted")

TRAINED_ON: dict[str, frozenset[str]] = {
    "repllama": frozenset({"msmarco"}),
    "e5-mistral": frozenset({"msmarco", "fever", "hotpotqa", "nq", "quora"}),
}
"""Corpora whose training split each retriever was trained on. All others are zero-shot."""

_PUBLIC: dict[tuple[str, str], float] = {
    ("e5-mistral", "arguana"): 61.65,
    ("e5-mistral", "fiqa"): 56.81,
    ("all-minilm-l6-v2", "arguana"): 50.17,
    ("all-minilm-l6-v2", "nfcorpus"): 31.59,
    ("all-minilm-l6-v2", "scifact"): 64.51,
}


def paper_scores(retriever: str, corpus: str) -> PaperScores | None:
    """Return nDCG@10 times 100 before and after RE-AdaptIR, from the paper's Table 1; None if it has no such row.

    Args:
        retriever: the retriever's name in the catalog, such as "e5-mistral".
        corpus: the corpus's name in the catalog, such as "scifact".
    """
    if retriever not in _PAPER_RETRIEVERS or corpus not in _TABLE_1:
        return None
    return _TABLE_1[corpus][_PAPER_RETRIEVERS.index(retriever)]


def paper_gain(retriever: str, corpus: str, arm: str) -> float | None:
    """Return a variant's gain over base in points of nDCG@10, from the paper's Tables 1 and 2; None if not in them.

    `arm` is the name of the variant, such as "readapted". For that one, Table 2 counts where it has the corpus.
    """
    in_table_2 = _TABLE_2.get(retriever, {}).get(corpus)
    if in_table_2 is not None and arm in _TABLE_2_ARMS:
        return in_table_2[_TABLE_2_ARMS.index(arm)]
    scores = paper_scores(retriever, corpus)
    return round(scores.readapted - scores.base, 1) if scores is not None and arm == "readapted" else None


def public_score(retriever: str, corpus: str) -> float | None:
    """Return the unchanged retriever's nDCG@10 times 100 according to embeddings-benchmark; None if not listed here."""
    return _PUBLIC.get((retriever, corpus))
