"""The tables of formats, columns, models and targets on the pages are what the code knows and what the tests run."""

import re
from pathlib import Path

from readapt_ray.catalog.retrievers import TARGETS_BY_FAMILY
from readapt_ray.sources import columns, label_tables, opening
from readapt_ray.sources.formats import FORMATS
from readapt_ray.targets import milvus, opensearch, pgvector, qdrant
from readapt_ray.targets.opening import TARGETS
from tests.families import FAMILIES
from tests.targets.conftest import PLACES, SLOW

PACKAGE = Path(opening.__file__).parent.parent
NAMED_IN_WORDS = {
    "bert": "BERT",
    "xlm-roberta": "XLM-RoBERTa",
    "mpnet": "MPNet",
    "modernbert": "ModernBERT",
    "nomic_bert": "NomicBERT",
    "eurobert": "EuroBERT",
    "jina_embeddings_v3": "Jina v3",
    "gte": "GTE",
    "qwen2": "Qwen2",
    "gemma3_text": "Gemma 3",
}
OTHERS_LIKE_THEM = {
    "ministral3", "gemma", "gemma2", "olmo3", "smollm3", "phi3", "modernbert-decoder", "xlm-roberta-xl",
}  # fmt: skip
"""Families that the page has no room for."""


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading of a page, without its first two lines."""
    _, _, rest = (PACKAGE / page / "README.md").read_text().partition(f"\n## {heading}\n")
    table = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("|")]
    assert len(table) > 3
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_each_family_of_models_is_listed_and_those_said_to_be_tested_are() -> None:
    listed = {name for row in rows("catalog", "Families") for name in spans(row[0]) if name != "model_type"}
    assert listed <= TARGETS_BY_FAMILY.keys()
    assert TARGETS_BY_FAMILY.keys() - listed == OTHERS_LIKE_THEM
    page = (PACKAGE / "catalog/README.md").read_text()
    said = re.search(r"Tiny models of ([^:]*?) are tested", page.replace("\n", " "))
    assert said is not None
    due = {NAMED_IN_WORDS[each.model_type] for each in FAMILIES.values()}
    assert set(re.split(r", | and ", said[1])) == due


def test_each_format_is_listed_with_its_suffixes() -> None:
    listed = {spans(row[0])[0]: spans(row[1]) for row in rows("sources", "Sources") if spans(row[0])}
    assert {name: tuple(listed[name]) for name in FORMATS} == {name: each.suffixes for name, each in FORMATS.items()}
    assert tuple(listed["text"]) == opening._SUFFIXES["text"]


def test_each_name_of_a_column_is_listed() -> None:
    corpus, queries, qrels = (spans(row[1]) for row in rows("sources", "Columns"))
    assert corpus == [*columns.ID_NAMES, *columns.TEXT_NAMES, *columns.TITLE_NAMES]
    for found, kind in ((queries, label_tables.QUERIES), (qrels, label_tables.QRELS)):
        due = {name for names in kind.fields.values() for name in names}
        assert due <= set(found)
        assert set(found) - due <= {".qrels", ".qrel", ".trec", ".txt"}


def test_each_target_is_listed_with_what_its_tests_run_against() -> None:
    lines = (PACKAGE / "targets/README.md").read_text().splitlines()
    listed = [line.strip("|").split(" | ") for line in lines if line.startswith("| `") and "--to" not in line]
    assert [spans(row[0])[0] for row in listed] == [
        TARGETS[name].example for name in ("qdrant", "lancedb", "postgresql", "opensearch", "milvus", "files")
    ]
    assert len(listed) == len(TARGETS)
    for row, place in zip(listed, ("qdrant", "lancedb", "pgvector", "opensearch", "milvus", "files"), strict=True):
        assert place in PLACES
        assert ("slow tests" in row[3]) == (place in SLOW)


def test_the_dimensions_of_a_target_are_those_that_it_refuses_more_of() -> None:
    listed = {name: dimensions for name, dimensions, _ in rows("targets", "Per database")}
    assert len(listed) == len(TARGETS)
    for name, module in (("Qdrant", qdrant), ("OpenSearch", opensearch), ("Milvus", milvus)):
        assert listed[name] == f"{module._MAX_DIMENSION:,}"
    most = pgvector._MOST
    assert listed["pgvector"] == f"{most['vector']:,}, or {most['halfvec']:,} with `&type=halfvec`"
