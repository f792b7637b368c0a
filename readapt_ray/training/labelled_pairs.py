"""Read labelled pairs for finetuning, from a corpus with judgements or a file of pairs, and tokenise them.

The driver holds the judged passages and their hard negatives: 1 GB per million passages of 1,000 characters. A file of
pairs is streamed, with some 100 bytes in memory per text.

If ingest split a document, the passage that shares most words with the query represents it, as an answer and as a hard
negative; all its passages are in memory. No passage of a document is a negative of a query that the document answers.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel
from readapt_ray.errors import CorpusError, FingerprintMismatchError
from readapt_ray.made_of import open_input
from readapt_ray.progress import amount
from readapt_ray.records import Passage
from readapt_ray.retrieval.bm25 import words
from readapt_ray.retrieval.passage_files import PassageFiles
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.retrieval.tokenization import TextTokenizer

_TEXTS_PER_CALL = 1024


class TrainingPair(NamedTuple):
    """A query, a passage that answers it, and hard negatives: passages that do not."""

    query: str
    passage: Passage
    negatives: list[Passage]


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """The place of labelled pairs: a corpus with queries and qrels, or a JSONL file."""

    name: str
    """What the user called it."""
    fingerprints: dict[str, str]
    """Fingerprints of the inputs, by the names of their options."""
    corpus: Artifact | None = None
    """Output of ingest with the passages; None if `file` holds the pairs."""
    labels: Location | None = None
    """Folder with the queries and qrels; None if `file` holds the pairs."""
    split: str = ""
    """Split of the qrels; empty if `file` holds the pairs."""
    file: Location | None = None
    """JSONL file of pairs; None if they are in a corpus."""
    run: Location | None = field(default=None)
    """TREC run that hard negatives are taken from; None for none."""


def open_pairs(corpus: str, split: str, negatives: str | None) -> PairSource:
    """Open a corpus with judgements, queries that a language model wrote for one, or a JSONL file of pairs.

    Args:
        corpus: output of ingest or synthesize, or a JSONL file (its name ends with .jsonl), which is hashed.
        split: split of the qrels, such as train; ignored for a file.
        negatives: TREC run to take hard negatives from; None for none.

    Raises:
        ArtifactMissingError: `corpus` is none of these.
        CorpusError: the corpus has no qrels of that split, the run does not exist, or a run was given with a file.
        FingerprintMismatchError: the corpus of the written queries was replaced.
    """
    run = None if negatives is None else Location(negatives)
    file = Location(corpus)
    if file.name.endswith(".jsonl") and file.is_file():
        if run is not None:
            raise CorpusError(
                f"negatives = {negatives!r} names doc_ids and {corpus!r} holds texts; put them into its lines as `negatives`"
            )
        return PairSource(name=corpus, file=file, fingerprints={"corpus": file.sha256()})
    labels, artifact = _open_labels(corpus)
    if not (labels.location / "qrels" / f"{split}.parquet").is_file():
        there = [each.name.removesuffix(".parquet") for each in (labels.location / "qrels").files(".parquet")]
        raise CorpusError(
            f"{corpus!r} has no qrels of the split {split!r}; it has {there or 'no qrels at all, and `readapt synthesize` writes queries'}"
        )
    fingerprints = {"corpus": labels.fingerprint}
    if run is not None:
        if not run.is_file():
            raise CorpusError(f"no run {negatives!r}; give the output of `readapt search`")
        fingerprints["negatives"] = run.sha256()
    return PairSource(
        name=corpus, corpus=artifact, labels=labels.location, split=split, run=run, fingerprints=fingerprints
    )


def _open_labels(uri: str) -> tuple[Artifact, Artifact]:
    """Open the artifact with queries and qrels, and the one with the passages. They differ for synthesized queries."""
    manifest = artifacts.read_manifest(uri)
    if manifest is None or manifest.stage != "synthesize":
        corpus = artifacts.open_artifact(uri, "ingest")
        return corpus, corpus
    labels = artifacts.open_artifact(uri, "synthesize")
    corpus = open_input(labels, "corpus", "ingest")
    if corpus.fingerprint != labels.manifest.inputs["corpus"]:
        raise FingerprintMismatchError(
            f"{corpus.uri!r} is not the corpus that the queries of {uri!r} were written for; synthesize them again"
        )
    return labels, corpus


def write_pairs(
    source: PairSource, model: OpenModel, encoding: Encoding, target: Location, *, num_negatives: int
) -> None:
    """Tokenise every pair and write a Parquet file, in the order of the qrels or of the JSONL file.

    Of qrels, only those are pairs that are above 0 and name a query and a passage of the corpus; others are left out.
    Texts with the same tokens get the same number, since they are the same to the model.

    Args:
        source: the pairs.
        model: the model whose tokenizer is used.
        encoding: prompts, special tokens and maximum lengths.
        target: the file to write, of PAIR_SCHEMA.
        num_negatives: most hard negatives per query, if the source has a run. A JSONL file's own are all kept.

    Raises:
        CorpusError: there are fewer than two pairs, or a line of the file is not a pair.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from readapt_ray.retrieval.tokenization import TextTokenizer
    from readapt_ray.training.pairs import PAIR_SCHEMA

    pairs, document_of = (
        _judged_pairs(source, num_negatives) if source.file is None else (_file_pairs(source.file), None)
    )
    columns = _Columns(TextTokenizer(model.tokenizer, encoding), document_of)
    num_pairs = 0
    with target.open_output() as stream, pq.ParquetWriter(stream, PAIR_SCHEMA, compression="zstd") as writer:
        while part := list(itertools.islice(pairs, _TEXTS_PER_CALL)):
            writer.write_table(pa.table(columns.of(part), schema=PAIR_SCHEMA))
            num_pairs += len(part)
        if num_pairs < 2:
            of_split = f"of the split {source.split!r} whose query and passage it holds"
            raise CorpusError(
                f"{source.name!r} has {amount(num_pairs, 'pairs')} "
                f"{of_split if source.split else 'of query and positive'}; at least 2 are needed"
            )


class _Columns:
    """A maker of the columns of PAIR_SCHEMA. It numbers texts and documents from 0; equal texts get one number.

    Args:
        tokenizer: tokenizer of the model that is trained.
        document_of: document of each passage, by doc_id; None if ingest did not split documents.
    """

    def __init__(self, tokenizer: "TextTokenizer", document_of: Mapping[str, str] | None) -> None:
        self._tokenizer, self._document_of = tokenizer, document_of
        self._queries: dict[bytes, int] = {}
        self._passages: dict[bytes, int] = {}
        self._documents: dict[str, int] = {}

    def of(self, part: Sequence[TrainingPair]) -> dict[str, Any]:
        """Tokenise and number some pairs; return their columns by name."""
        found = iter(self._passage_ids([each for pair in part for each in pair.negatives]))
        query_ids = self._tokenizer.ids([pair.query for pair in part], "query")
        right_ids = self._passage_ids([pair.passage for pair in part])
        negative_ids = [[next(found) for _ in pair.negatives] for pair in part]
        return {
            "query_ids": query_ids,
            "query_number": _numbers(query_ids, self._queries),
            "passage_ids": right_ids,
            "doc_number": _numbers(right_ids, self._passages),
            "doc_id": [pair.passage.doc_id for pair in part],
            "negative_ids": negative_ids,
            "negative_numbers": [_numbers(ids, self._passages) for ids in negative_ids],
            "document_number": self._document_numbers([pair.passage for pair in part]) or [None] * len(part),
            "negative_document_numbers": [self._document_numbers(pair.negatives) for pair in part],
        }

    def _passage_ids(self, listed: Sequence[Passage]) -> Any:
        if not listed:
            return []
        return self._tokenizer.ids([each.text for each in listed], "passage", [each.title for each in listed])

    def _document_numbers(self, listed: Sequence[Passage]) -> Sequence[int | None] | None:
        if self._document_of is None:
            return None
        documents = [self._document_of[each.doc_id] for each in listed]
        return [self._documents.setdefault(each, len(self._documents)) for each in documents]


def _numbers(texts: Iterable[Sequence[int]], known: dict[bytes, int]) -> list[int]:
    """Return the number of each tokenised text; new texts get the next numbers and are added to `known`."""
    digests = (hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=16).digest() for ids in texts)
    return [known.setdefault(digest, len(known)) for digest in digests]


def _judged_pairs(source: PairSource, num_negatives: int) -> tuple[Iterator[TrainingPair], Mapping[str, str] | None]:
    """Return the judged pairs; and the document of each of their passages, None if ingest split no documents."""
    from readapt_ray.sources.judgements import read_qrels, read_queries

    assert source.corpus is not None and source.labels is not None
    queries = {query.query_id: query.text for query in read_queries((source.labels / "queries").uri)}
    qrels = read_qrels((source.labels / "qrels" / f"{source.split}.parquet").uri)
    relevant = [qrel for qrel in qrels if qrel.relevance > 0 and qrel.query_id in queries]
    right: dict[str, set[str]] = {}
    for qrel in relevant:
        right.setdefault(qrel.query_id, set()).add(qrel.doc_id)
    corpus = PassageFiles.open(source.corpus.uri)
    hard = _hard_negatives(source.run, right, num_negatives, corpus) if source.run is not None else {}
    wanted = {qrel.doc_id for qrel in relevant} | {each for ids in hard.values() for each in ids}
    passages = corpus.pieces_of(wanted)
    pairs = (
        TrainingPair(
            queries[qrel.query_id],
            _best(queries[qrel.query_id], passages[qrel.doc_id]),
            [_best(queries[qrel.query_id], passages[each]) for each in hard.get(qrel.query_id, []) if each in passages],
        )
        for qrel in relevant
        if qrel.doc_id in passages
    )
    if not corpus.is_split:
        return pairs, None
    return pairs, corpus.documents_of(each.doc_id for own in passages.values() for each in own)


def _best(query: str, passages: Sequence[Passage]) -> Passage:
    """Return the passage of a document that has most words of the query; of equals, the first.

    A word counts 1 / (number of passages with it), since a word in all passages does not help to choose.
    """
    if len(passages) == 1:
        return passages[0]
    asked = set(words(query))
    shared = [asked.intersection(words(each.text)) for each in passages]
    num_with = Counter(word for own in shared for word in own)
    scores = [sum(1 / num_with[word] for word in sorted(own)) for own in shared]
    return passages[scores.index(max(scores))]


def _hard_negatives(
    run: Location, right: Mapping[str, set[str]], num_negatives: int, corpus: PassageFiles
) -> dict[str, list[str]]:
    """Return the best results of each query in a run that are not relevant to it, nor part of a relevant document."""
    from readapt_ray.evaluation.runs import read_run

    ranked = {query_id: [each.doc_id for each in found] for query_id, found in read_run(run.uri).items()}
    document_of = corpus.documents_of(itertools.chain(*ranked.values(), *right.values()))
    hard: dict[str, list[str]] = {}
    for query_id in right.keys() & ranked.keys():
        answers = {document_of[each] for each in right[query_id]}
        hard[query_id] = [each for each in ranked[query_id] if document_of[each] not in answers][:num_negatives]
    return hard


def _file_pairs(file: Location) -> Iterator[TrainingPair]:
    """Yield the pairs of a JSONL file; the ids of passages are their line numbers."""
    from readapt_ray.sources.lines import read_lines
    from readapt_ray.sources.source import REASONS, BadRow

    for line in read_lines(file, str(file)):
        if isinstance(line, BadRow):
            raise CorpusError(f"{line.place} is no pair: {REASONS[line.reason]}; fix or remove that line")
        where = f"line {line.number}"
        try:
            row = json.loads(line.text)
            query, positive = row["query"], row["positive"]
            negatives = row.get("negatives") or []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorpusError(
                f'{file}, {where} is no pair ({error!r}); a line is {{"query": "...", "positive": "..."}}, with '
                f'"negatives": ["...", ...] where there are some'
            ) from error
        if not isinstance(negatives, list):
            raise CorpusError(f"{file}, {where}: negatives must be a list of texts, not {negatives!r}")
        if not all(isinstance(text, str) and text.strip() for text in (query, positive, *negatives)):
            raise CorpusError(f"{file}, {where}: query, positive and negatives must be texts that are not empty")
        yield TrainingPair(
            query,
            Passage(where, str(row.get("title") or ""), positive),
            [Passage(f"{where}, negative {place}", "", text) for place, text in enumerate(negatives, 1)],
        )
