"""Measure a corpus for a plan: count or estimate its passages, and estimate tokens and bytes from a sample.

The number of passages is exact if the root has the output of ingest. Otherwise the source is read as ingest reads it,
up to 50,000 passages, and the rest is estimated. It takes a few seconds; memory holds the sample.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact
from readapt_ray.catalog import corpora, models, retrievers
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.errors import CorpusError, ModelError
from readapt_ray.planner import judged
from readapt_ray.retrieval.tokenization import fill_passage
from readapt_ray.sources.cleaning import checked
from readapt_ray.sources.opening import open_source
from readapt_ray.sources.pieces import MIN_PIECE_BYTES
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow, Source
from readapt_ray.sources.table_sources import TableSource
from readapt_ray.stages.ingest import MIN_PARALLEL_BYTES, IngestConfig
from readapt_ray.storage import Location

SAMPLE_PASSAGES: Final = 2_000
_COUNTED_ROWS: Final = 50_000
_SAMPLED_GROUPS: Final = 16
_BYTES_A_TOKEN: Final = 4.0
_BYTES_A_WORD: Final = 6.0
"""Bytes per English word with its space. For MS MARCO's collection.tsv, 337 bytes per passage, it is 6.02."""
_UNKNOWN_TOKENIZER_ERROR: Final = 0.3


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The size of a corpus: counted, or estimated from a sample."""

    num_passages: int
    text_bytes: float
    """Mean bytes of title and text per passage."""
    train_tokens: float
    """Mean tokens per passage in training: the pretrained model's tokenizer, truncated at block_tokens."""
    embed_tokens: float
    """Mean tokens per passage in embedding: the retriever's tokenizer and template, truncated at its maximum length."""
    error: float
    """Relative error of the number of tokens: two standard errors of the mean; at least 0.3 without the tokenizers."""
    num_queries: int
    """Queries that are searched: those with judgements. 0 if there are none or their number is unknown."""
    note: str
    """Says where the figures are from."""
    num_parts: int | None = 1
    """Most parts that ingest can cut the source into; 1 if one process reads it, None if only the bytes limit them."""

    @property
    def num_pieces(self) -> int:
        """Return the number of tasks with which ingest reads the source, if there are enough CPUs; 1 if it is small."""
        total_bytes = self.num_passages * self.text_bytes
        if total_bytes < MIN_PARALLEL_BYTES:
            return 1
        pieces = math.ceil(total_bytes / MIN_PIECE_BYTES)
        return pieces if self.num_parts is None else min(pieces, self.num_parts)

    def with_num_passages(self, num_passages: int) -> "Corpus":
        """Return a copy with another number of passages; means per passage and the number of queries stay the same."""
        return replace(self, num_passages=num_passages)


@dataclass(frozen=True, kw_only=True)
class _Sample:
    passages: list[tuple[str, str]]
    num_passages: int
    note: str
    num_queries: int | None
    num_parts: int | None = 1


def measure_corpus(
    ingest: IngestConfig,
    *,
    pretrained: str,
    retriever: str,
    encoding: Encoding,
    block_tokens: int,
    num_passages: int | None,
    num_queries: int | None,
    split: str,
) -> Corpus:
    """Count the passages of a corpus, and estimate its tokens from a sample.

    Above 50,000 passages, the number is estimated from the share of the source that was read, unless ingest has counted
    them. Of a published corpus in the catalog that is not ingested, the sizes in the catalog are used: nothing is read.

    Args:
        ingest: options of ingest; if its output is complete, that is read instead of the source.
        pretrained, retriever: models whose tokenizers count tokens. A tokenizer that is not on this machine is not
            downloaded; then 4 bytes count as a token.
        encoding: templates and maximum length of the retriever.
        block_tokens: maximum length of a passage in training, in tokens.
        num_passages: use this number instead of counting; None to count.
        num_queries: use this number instead of counting judged queries; None to count. If they cannot be counted, the
            corpus gets 0 queries.
        split: split of the judgements that are counted, such as "test".

    Raises:
        InputError: the source cannot be read.
        CorpusError: no passage could be read, or the source does not tell its size.
    """
    source = ingest.source
    manifest = artifacts.read_manifest(ingest.output)
    if manifest is None and not Location(source).exists() and (row := corpora.find_corpus(source)) is not None:
        return _known_corpus(row, num_passages, num_queries)
    if manifest is not None and manifest.stage == "ingest":
        sample = _ingested_sample(artifacts.open_artifact(ingest.output, "ingest"), split)
    else:
        sample = _source_sample(source, ingest.format, ingest.read_options(), split)
    if not sample.passages:
        raise CorpusError(f"no passage of {source!r} could be read, so there is nothing to plan with")
    trained, train_known = _counts(pretrained, [f"{title} {text}".strip() for title, text in sample.passages])
    embedded, embed_known = _counts(retriever, [fill_passage(encoding, *each) for each in sample.passages])
    train_lengths = [min(count + 2, block_tokens) for count in trained]
    embed_lengths = [min(count + 2, encoding.max_passage_tokens) for count in embedded]
    error = max(_relative_error(train_lengths), _relative_error(embed_lengths))
    note = f"{sample.note}; tokens from a sample of {len(sample.passages):,}"
    if not (train_known and embed_known):
        error = max(error, _UNKNOWN_TOKENIZER_ERROR)
        note += f", at {_BYTES_A_TOKEN:.0f} bytes a token, since the tokenizer is not on this machine"
    queries = num_queries if num_queries is not None else sample.num_queries
    return Corpus(
        num_passages=num_passages or sample.num_passages,
        text_bytes=_mean([len(title.encode()) + len(text.encode()) for title, text in sample.passages]),
        train_tokens=_mean(train_lengths),
        embed_tokens=_mean(embed_lengths),
        error=error,
        num_queries=queries or 0,
        num_parts=sample.num_parts,
        note=note if num_passages is None else f"{num_passages:,} passages as given; {note}",
    )


def _known_corpus(row: corpora.Corpus, num_passages: int | None, num_queries: int | None) -> Corpus:
    """Return the size of a known corpus from the catalog, so that a plan does not download gigabytes."""
    text_bytes = row.mean_words * _BYTES_A_WORD
    num_tokens = text_bytes / _BYTES_A_TOKEN + 2
    count = num_passages or row.num_passages
    return Corpus(
        num_passages=count,
        text_bytes=text_bytes,
        train_tokens=num_tokens,
        embed_tokens=num_tokens,
        error=_UNKNOWN_TOKENIZER_ERROR,
        num_queries=row.num_judged_queries if num_queries is None else num_queries,
        note=(
            f"{count:,} passages of {row.mean_words:g} words, as the catalog has {row.title}, at {_BYTES_A_WORD:g} bytes a word and "
            f"{_BYTES_A_TOKEN:g} bytes a token; nothing was fetched"
        ),
    )


def _ingested_sample(artifact: Artifact, split: str) -> _Sample:
    """Sample rows of an ingested corpus, spread over all its files."""
    import pyarrow.parquet as pq

    files = (artifact.location / "passages").files(".parquet")
    counts = artifact.manifest.counts
    chosen = files[:: max(1, len(files) // _SAMPLED_GROUPS)]
    rng = random.Random(0)
    passages = []
    for file in chosen:
        with file.open_input() as stream:
            parquet = pq.ParquetFile(stream)
            num_groups = min(parquet.num_row_groups, max(1, _SAMPLED_GROUPS // len(chosen)))
            groups = rng.sample(range(parquet.num_row_groups), num_groups)
            table = parquet.read_row_groups(groups, columns=["title", "text"])
        rows = list(zip(table["title"].to_pylist(), table["text"].to_pylist(), strict=True))
        passages += rng.sample(rows, min(len(rows), SAMPLE_PASSAGES // len(chosen)))
    num, num_pieces = counts["num_passages"], artifact.manifest.details.get("num_pieces", 1)
    return _Sample(
        passages=passages,
        num_passages=num,
        note=f"{num:,} passages counted by ingest",
        num_queries=judged.num_ingested(artifact.location, split),
        num_parts=None if num_pieces > 1 else 1,
    )


def _source_sample(name: str, format: Any, options: ReadOptions, split: str) -> _Sample:
    """Draw a uniform sample from the first 50,000 rows; estimate the total from the share of bytes that was read."""
    source = open_source(name, format, options)
    source.check()
    num_parts = _num_parts(source)
    rng = random.Random(0)
    kept: list[tuple[str, str]] = []
    seen = 0
    ended = True
    for row in source.rows():
        passage = row if isinstance(row, BadRow) else checked(row, max_text_bytes=options.max_text_bytes)
        if isinstance(passage, BadRow):
            continue
        seen += 1
        place = len(kept) if len(kept) < SAMPLE_PASSAGES else rng.randrange(seen)
        if place == len(kept):
            kept.append((passage.title, passage.text))
        elif place < SAMPLE_PASSAGES:
            kept[place] = (passage.title, passage.text)
        if seen == _COUNTED_ROWS:
            ended = False
            break
    if ended:
        queries = judged.num_in_source(source, split)
        note = f"{seen:,} passages counted"
        return _Sample(passages=kept, num_passages=seen, note=note, num_queries=queries, num_parts=num_parts)
    share = source.fraction_read
    if share <= 0:
        raise CorpusError(
            f"{name!r} does not tell how large it is, and has more than {_COUNTED_ROWS:,} passages; say how many with "
            f"--num-passages N, or ingest it first"
        )
    estimated = round(seen / share)
    return _Sample(
        passages=kept,
        num_passages=estimated,
        note=f"{estimated:,} passages, estimated from the first {seen:,} ({100 * share:.1f}% of the source)",
        num_queries=None,
        num_parts=num_parts,
    )


def _num_parts(source: Source) -> int | None:
    """Return the most parts that ingest can cut a source into; None if files are cut by lines or row groups."""
    if not isinstance(source, TableSource):
        return 1
    first = source.files()[0]
    is_cut = source.table_format.split_at(first.location, first.label, source.options) != "nowhere"
    return None if is_cut else len(source.files())


def encoding_of(retriever: str) -> Encoding:
    """Return the encoding of a retriever, from the catalog, else from its folder.

    Of a hub model or URI outside the catalog, the files are fetched, without weights.

    Args:
        retriever: catalog name, folder, URI or hub id.

    Raises:
        ModelError: the model cannot be found, or does not say its encoding.
    """
    row = models.find_row(retriever)
    return row.encoding if row else models.open_model(retriever, with_weights=False).encoding


def _counts(model: str, texts: Sequence[str]) -> tuple[list[int], bool]:
    """Return the number of tokens of each text, without special tokens; False if they are estimated from bytes."""
    tokenizer = _tokenizer(model)
    if tokenizer is None:
        return [round(len(text.encode()) / _BYTES_A_TOKEN) for text in texts], False
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]], True


def _tokenizer(model: str) -> Any:
    """Return a model's tokenizer from its folder or the hub's cache; None if it is not on this machine."""
    from transformers import AutoTokenizer

    row = models.find_row(model)
    names = [model if models.own_folder(model) is not None else retrievers.hub_id(model)]
    names += [row.pretrained] if row else []
    for name in names:
        try:
            is_here = models.own_folder(name) is not None or Location(name).is_folder()
            if is_here or retrievers.hub_id(name).startswith("builtin:"):
                return models.open_model(name, with_weights=False).tokenizer
            return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ModelError):
            continue
    return None


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _relative_error(values: Sequence[float]) -> float:
    mean = _mean(values)
    if len(values) < 2 or mean == 0:
        return 1.0
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return 2 * math.sqrt(variance / len(values)) / mean
