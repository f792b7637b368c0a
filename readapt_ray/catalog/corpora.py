"""List the known corpora: the fourteen of RE-AdaptIR's tables (MS MARCO dev and thirteen of BEIR).

Sizes come from the ir_datasets 0.6.3 metadata and from BEIR's table 1 (arXiv 2104.08663); the
task sentences are E5-Mistral's (microsoft/unilm `e5/utils.py`), without a final period. The hub ids are
from memory.
"""

from typing import Literal

from readapt_ray.config import Config
from readapt_ray.errors import CorpusError

_BEIR = "BEIR, arXiv 2104.08663, table 1; ir_datasets 0.6.3 metadata"

_MEAN_WORDS = {
    "msmarco": 55.98,
    "fever": 84.76,
    "hotpotqa": 46.30,
    "nq": 78.88,
    "quora": 11.44,
    "arguana": 166.80,
    "climate-fever": 84.76,
    "dbpedia-entity": 49.68,
    "fiqa": 132.32,
    "nfcorpus": 232.26,
    "scidocs": 176.19,
    "scifact": 213.63,
    "trec-covid": 160.77,
    "webis-touche2020": 292.37,
}


class Corpus(Config):
    """A row of the catalog of corpora."""

    name: str
    """Name on the command line."""
    title: str
    """Name in the paper's tables."""
    num_passages: int
    """Number of passages."""
    mean_words: float
    """Mean length of a passage in words (BEIR, table 1)."""
    num_judged_queries: int
    """Number of queries of `split` with at least one judgement."""
    split: Literal["dev", "test"] = "test"
    """Judgements on which the paper reports scores."""
    measure: str = "nDCG@10"
    """The measure of the paper's tables, by its ir-measures name."""
    task: str
    """E5-Mistral's task sentence."""
    drops_self_hits: bool = False
    """Whether a passage with the id of the query is removed from its results. Every harness does so for ArguAna and
    Quora, whose queries are passages; mteb also does for FEVER, FiQA and MS MARCO."""
    ir_datasets_id: str
    """Its name in ir_datasets, with the judgements of `split`."""
    aliases: tuple[str, ...] = ()
    """Other names that users may give."""
    hub_id: str
    """Id of its data set on the Hugging Face hub."""
    source: str = _BEIR
    """Source of these facts."""


def _row(name: str, title: str, num_passages: int, num_judged_queries: int, task: str, **changes: object) -> Corpus:
    values: dict[str, object] = {
        "name": name,
        "title": title,
        "num_passages": num_passages,
        "mean_words": _MEAN_WORDS[name],
        "num_judged_queries": num_judged_queries,
        "task": task,
        "ir_datasets_id": f"beir/{name}",
        "hub_id": f"BeIR/{name}",
    }
    return Corpus.model_validate(values | changes)


CORPORA: tuple[Corpus, ...] = (
    _row(
        *("msmarco", "MS MARCO", 8_841_823, 6_980),
        task="Given a web search query, retrieve relevant passages that answer the query",
        split="dev",
        ir_datasets_id="beir/msmarco/dev",
        aliases=("msmarco-passage",),
        source=f"{_BEIR}; the paper scores dev with nDCG@10",
    ),
    _row(
        *("fever", "FEVER", 5_416_568, 6_666),
        task="Given a claim, retrieve documents that support or refute the claim",
        ir_datasets_id="beir/fever/test",
    ),
    _row(
        *("hotpotqa", "HotpotQA", 5_233_329, 7_405),
        task="Given a multi-hop question, retrieve documents that can help answer the question",
        ir_datasets_id="beir/hotpotqa/test",
    ),
    _row(
        *("nq", "NQ", 2_681_468, 3_452),
        task="Given a question, retrieve Wikipedia passages that answer the question",
    ),
    _row(
        *("quora", "Quora", 522_931, 10_000),
        task="Given a question, retrieve questions that are semantically equivalent to the given question",
        drops_self_hits=True,
        ir_datasets_id="beir/quora/test",
    ),
    _row(
        *("arguana", "ArguAna", 8_674, 1_406),
        task="Given a claim, find documents that refute the claim",
        drops_self_hits=True,
    ),
    _row(
        *("climate-fever", "Climate-FEVER", 5_416_593, 1_535),
        task="Given a claim about climate change, retrieve documents that support or refute the claim",
    ),
    _row(
        *("dbpedia-entity", "DBPedia", 4_635_922, 400),
        task="Given a query, retrieve relevant entity descriptions from DBPedia",
        ir_datasets_id="beir/dbpedia-entity/test",
    ),
    _row(
        *("fiqa", "FiQA", 57_638, 648),
        task="Given a financial question, retrieve user replies that best answer the question",
        ir_datasets_id="beir/fiqa/test",
    ),
    _row(
        *("nfcorpus", "NFCorpus", 3_633, 323),
        task="Given a question, retrieve relevant documents that best answer the question",
        ir_datasets_id="beir/nfcorpus/test",
    ),
    _row(
        *("scidocs", "SCIDOCS", 25_657, 1_000),
        task="Given a scientific paper title, retrieve paper abstracts that are cited by the given paper",
    ),
    _row(
        *("scifact", "SciFact", 5_183, 300),
        task="Given a scientific claim, retrieve documents that support or refute the claim",
        ir_datasets_id="beir/scifact/test",
    ),
    _row(
        *("trec-covid", "TREC-COVID", 171_332, 50),
        task="Given a query on COVID-19, retrieve documents that answer the query",
    ),
    _row(
        *("webis-touche2020", "Touche-2020", 382_545, 49),
        task="Given a question, retrieve detailed and persuasive arguments that answer the question",
        ir_datasets_id="beir/webis-touche2020/v2",
    ),
)


def find_corpus(name: str) -> Corpus | None:
    """Return the catalog's row of a corpus by its name, alias, title in the paper or hub id; None if it has none.

    Lower or upper case does not matter.
    """
    lowered = name.lower()
    return next(
        (row for row in CORPORA if lowered in (row.name, row.title.lower(), row.hub_id.lower(), *row.aliases)), None
    )


def corpus(name: str) -> Corpus:
    """Return the catalog's row of a corpus, by the names that `find_corpus` knows.

    Raises:
        CorpusError: the corpus is not in the catalog.
    """
    row = find_corpus(name)
    if row is None:
        raise CorpusError(f"no corpus {name!r} in the catalog; it has {', '.join(each.name for each in CORPORA)}")
    return row
