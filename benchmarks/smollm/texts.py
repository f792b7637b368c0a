"""Write the texts of the study, cut to what the model reads, so that BM25, training and vectors all see the same.

    texts.py domain --source DATA/cranfield --tokenizer WORK/pretrained --output WORK/cranfield/source
    texts.py docs   --source networkx --tokenizer WORK/pretrained --output WORK/docs/networkx
    texts.py pairs  --source DATA/squad11 --tokenizer WORK/pretrained --output WORK/made

`domain` copies a BEIR folder: passages of 128 tokens at most with prompt and title (which is left out where the text begins
with it), queries whole (the retriever cuts them at 32). `docs` writes the docstrings of an installed Python package as a
BEIR folder, uncut: the first sentence of a docstring is a query, and the rest the passage that answers it (the source
`python-docs:`). `pairs` writes `pairs.jsonl`, a question of as many passages of the
train split each, with the `--words` words of the passage that share most with the question; and `dev`, a BEIR folder of
passages of the dev split with two questions each. Both are drawn by `--seed`.
"""

import argparse
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from readapt_ray.records import Qrel, Query
from readapt_ray.sources.python_docs import PythonDocsSource
from readapt_ray.sources.source import Row

MAX_PASSAGE_TOKENS = 128
PROMPT = "passage: "


def main() -> None:
    """Write what is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["domain", "docs", "pairs"])
    parser.add_argument("--source", type=Path, required=True, help="BEIR folder; of docs the name of a package")
    parser.add_argument("--tokenizer", required=True, help="folder of the model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-pairs", type=int, default=4000)
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--num-dev", type=int, default=300, help="passages of the dev split")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.what == "docs":
        write_docs(str(options.source), options.output)
        return
    cut = Cut(options.tokenizer)
    if options.what == "domain":
        qrels = {"test.tsv": list(read_qrels(options.source / "qrels" / "test.tsv"))}
        copy_folder(options.source, options.output, cut, qrels)
        return
    dev = first_questions(read_qrels(options.source / "qrels" / "dev.tsv"), options.num_dev, 2, options.seed)
    copy_folder(options.source, options.output / "dev", cut, {"test.tsv": dev}, only={doc_id for _, doc_id, _ in dev})
    train = first_questions(read_qrels(options.source / "qrels" / "train.tsv"), options.num_pairs, 1, options.seed)
    pairs = windows(options.source, train, options.words)
    write_lines(options.output / "pairs.jsonl", pairs)


class Cut:
    """Cuts a passage to the tokens that the model reads."""

    def __init__(self, tokenizer: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row with its text cut at a token's end."""
        title, text = row.get("title") or "", row["text"]
        title = "" if text.startswith(title) else title
        start = f"{PROMPT}{title} " if title else PROMPT
        ends = self._tokenizer(start + text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(ends) > MAX_PASSAGE_TOKENS:
            text = text[: max(0, ends[MAX_PASSAGE_TOKENS - 1][1] - len(start))]
        return {"_id": row["_id"], "title": title, "text": text}


def write_docs(package: str, output: Path) -> None:
    """Write a package's docstrings as a BEIR folder; its corpus comes last, and one that is there is kept."""
    if (output / "corpus.jsonl").is_file():
        return
    source = PythonDocsSource(package)
    rows = [row for row in source.rows() if isinstance(row, Row)]
    queries = [query for query in source.queries() if isinstance(query, Query)]
    (output / "qrels").mkdir(parents=True, exist_ok=True)
    pairs = [qrel for qrels in source.qrels().values() for qrel in qrels if isinstance(qrel, Qrel)]
    lines = ["query-id\tcorpus-id\tscore", *(f"{each.query_id}\t{each.doc_id}\t{each.relevance}" for each in pairs)]
    (output / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    write_lines(output / "queries.jsonl", ({"_id": each.query_id, "text": each.text} for each in queries))
    write_lines(
        output / "corpus.jsonl", ({"_id": each.doc_id, "title": each.title, "text": each.text} for each in rows)
    )


def copy_folder(
    source: Path, output: Path, cut: Cut, qrels: dict[str, list[list[str]]], only: set[str] | None = None
) -> None:
    """Write a BEIR folder; its corpus comes last, and one that is there is kept."""
    if (output / "corpus.jsonl").is_file():
        return
    (output / "qrels").mkdir(parents=True, exist_ok=True)
    for name, rows in qrels.items():
        lines = ["\t".join(row) for row in [["query-id", "corpus-id", "score"], *rows]]
        (output / "qrels" / name).write_text("\n".join(lines) + "\n")
    judged = {query_id for rows in qrels.values() for query_id, _, _ in rows}
    write_lines(output / "queries.jsonl", (row for row in read_lines(source / "queries.jsonl") if row["_id"] in judged))
    passages = (row for row in read_lines(source / "corpus.jsonl") if only is None or row["_id"] in only)
    write_lines(output / "corpus.jsonl", map(cut, passages))


def first_questions(qrels: Iterable[list[str]], num_passages: int, per_passage: int, seed: int) -> list[list[str]]:
    """Draw passages, and of each so many questions: the first ones."""
    of_passage: dict[str, list[list[str]]] = {}
    for row in qrels:
        of_passage.setdefault(row[1], []).append(row)
    chosen = random.Random(seed).sample(sorted(of_passage), min(num_passages, len(of_passage)))
    return [row for doc_id in chosen for row in of_passage[doc_id][:per_passage]]


def windows(source: Path, qrels: list[list[str]], num_words: int) -> Iterator[dict[str, str]]:
    """Yield each question with the part of its passage that shares most of its rare words."""
    questions = {row["_id"]: row["text"] for row in read_lines(source / "queries.jsonl")}
    passages = {row["_id"]: row for row in read_lines(source / "corpus.jsonl")}
    counts = Counter(word for row in passages.values() for word in words_of(row["text"]))
    weight = {word: math.log(len(passages) / count) for word, count in counts.items()}
    for query_id, doc_id, _ in qrels:
        asked, words = words_of(questions[query_id]), passages[doc_id]["text"].split()
        parts = [words[start : start + num_words] for start in range(0, max(1, len(words) - num_words // 2), 10)]
        shared = [sum(weight.get(word, 0) for word in asked & words_of(" ".join(part))) for part in parts]
        best = " ".join(parts[shared.index(max(shared))])
        yield {"query": questions[query_id], "title": passages[doc_id].get("title") or "", "positive": best}


def words_of(text: str) -> set[str]:
    """Return the words of a text in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def read_qrels(file: Path) -> Iterator[list[str]]:
    """Yield query_id, doc_id and relevance of each judgement."""
    with file.open() as lines:
        next(lines)
        for line in lines:
            yield line.rstrip("\n").split("\t")


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file."""
    with file.open() as lines:
        yield from map(json.loads, lines)


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file, whole or not at all."""
    part = file.with_suffix(".part")
    with part.open("w") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part.rename(file)


if __name__ == "__main__":
    main()
