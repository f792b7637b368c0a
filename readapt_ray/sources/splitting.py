"""Split long documents into passages of a limited number of tokens, between paragraphs or sentences if possible.

In: a file of ingested documents. Out: the same file with passages `doc#1`, `doc#2` ... instead of each long document. A
passage has the title and the kept columns of its document, and the document's id as `parent_id`. A document that is
short enough stays one passage under its own id. One row group is in memory.
"""

import bisect
import functools
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from readapt_ray.catalog.models import open_model
from readapt_ray.errors import InputError
from readapt_ray.records import content_hash
from readapt_ray.sources.cleaning import num_bytes
from readapt_ray.storage import Location

_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])")
_LINE_END = re.compile(r"\n")
_SPACE = re.compile(r"\s+")
PIECE: Final = r"#\d+$"
"""Pattern of the end of a passage id, after the id of its document."""
_ROWS_AT_ONCE = 256
_DONE: Final = b"readapt.split"


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """Settings for splitting documents into passages."""

    max_tokens: int
    """Maximum number of tokens per passage, without title and special tokens."""
    overlap: int
    """Maximum number of tokens at the end of a passage that are repeated at the start of the next one."""
    tokenizer: str
    """Model whose tokenizer counts the tokens."""
    tokenizer_fingerprint: str = ""

    def split(self, texts: Sequence[str]) -> list[list[str]]:
        """Split each text into pieces of at most `max_tokens` tokens, counted when the piece is tokenized alone.

        A text that is short enough is returned whole. The pieces of each text are in order, and in a list of their own.
        """
        most = dict.fromkeys(range(len(texts)), self.max_tokens)
        pieces: dict[int, list[str]] = {}
        token_spans = self._token_spans(texts)
        while len(pieces) < len(texts):
            tried = {at: _cut(texts[at], token_spans[at], most[at], self.overlap) for at in most if at not in pieces}
            counts = iter(
                [len(spans) for spans in self._token_spans([piece for own in tried.values() for piece in own])]
            )
            for at, own in tried.items():
                excess = max((next(counts) for _ in own), default=0) - self.max_tokens
                if excess <= 0 or most[at] == 1:
                    pieces[at] = own
                most[at] = max(1, most[at] - max(excess, 1))
        return [pieces[at] for at in range(len(texts))]

    def _token_spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Return start and end (in characters) of each token of each text."""
        if not texts:
            return []
        tokenizer = _tokenizer(self.tokenizer, self.tokenizer_fingerprint, os.getpid())
        encoded = tokenizer(
            list(texts), add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
        )
        found: list[list[tuple[int, int]]] = encoded["offset_mapping"]
        return found


@functools.lru_cache(maxsize=1)
def _tokenizer(name: str, fingerprint: str, process: int) -> Any:
    """Load a tokenizer, once per process."""
    del fingerprint, process
    return open_model(name, with_weights=False).tokenizer


def open_splitting(max_tokens: int, overlap: int, tokenizer: str) -> Splitting:
    """Load the tokenizer, and return the settings for splitting documents.

    Args:
        max_tokens: maximum number of tokens per passage.
        overlap: maximum number of tokens that a passage repeats of the one before.
        tokenizer: the model whose tokenizer counts, by any name that `open_model` takes.

    Raises:
        InputError: the tokenizer cannot report the offsets of tokens in a text (it has no tokenizer.json).
        ModelError: the model does not exist, or has no tokenizer.
    """
    model = open_model(tokenizer, with_weights=False)
    if not model.tokenizer.is_fast:
        raise InputError(
            f"tokenizer = {tokenizer!r}: it does not say where in a text its tokens are, as those with a tokenizer.json do; give "
            f"another"
        )
    return Splitting(
        max_tokens=max_tokens,
        overlap=overlap,
        tokenizer=tokenizer,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
    )


def _cut(text: str, spans: Sequence[tuple[int, int]], max_tokens: int, overlap: int) -> list[str]:
    """Cut a text into pieces. A piece ends after a paragraph or sentence that ends in its second half, else after a word."""
    if len(spans) <= max_tokens:
        return [text]
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    boundaries = [[found.end() for found in mark.finditer(text)] for mark in (_LINE_END, _SENTENCE_END, _SPACE)]
    pieces, first, end = [], 0, 0
    while first + max_tokens < len(spans):
        begin, limit = starts[first], starts[first + max_tokens]
        covered = max(end, ends[first] - 1)
        half = max(covered, starts[first + max_tokens // 2])
        paragraph, sentence = (_last(places, half, limit) for places in boundaries[:2])
        before, end = end, paragraph or sentence or _last(boundaries[2], covered, limit) or limit
        if text[before:end].strip():
            pieces.append(text[begin:end].strip())
        following = max(bisect.bisect_right(ends, end), first + 1)
        first = max(_resumed(starts, boundaries, following, min(overlap, max_tokens - 1), end), first + 1)
    pieces.append(text[starts[first] :].strip())
    return [piece for piece in pieces if piece]


def _last(places: Sequence[int], after: int, until: int) -> int | None:
    """Return the last place that is above `after` and at most `until`; None if there is none. `places` are sorted."""
    at = bisect.bisect_right(places, until)
    return places[at - 1] if at and places[at - 1] > after else None


def _resumed(starts: Sequence[int], boundaries: Sequence[Sequence[int]], following: int, overlap: int, end: int) -> int:
    """Return the index of the token with which the next piece begins: the start of a sentence or word in the overlap."""
    if not overlap:
        return following
    earliest = starts[max(0, following - overlap)]
    for places in boundaries[1:]:
        at = bisect.bisect_left(places, earliest)
        if at < len(places) and places[at] < end:
            return max(bisect.bisect_right(starts, places[at]) - 1, following - overlap)
    return following


def parent_of(passage_id: str) -> str:
    """Return the id of the document of a passage, in a corpus that was split: `doc` for `doc#3`, and for `doc`."""
    return re.sub(PIECE, "", passage_id)


def first_piece(doc_id: str) -> str:
    """Return the id of the first passage of a document that was split into several: `doc#1` for `doc`."""
    return f"{doc_id}#1"


def piece_ids(doc_id: str, num_pieces: int) -> list[str]:
    """Return the ids of a document's passages: `doc#1`, `doc#2` and so on, or `doc` itself for a single passage.

    `parent_of` returns the document's id for each of them. So a single passage of a document `doc#7` is `doc#7#1`.
    """
    if num_pieces == 1 and not re.search(PIECE, doc_id):
        return [doc_id]
    return [f"{doc_id}#{number}" for number in range(1, num_pieces + 1)]


def split_part(file: Location, splitting: Splitting) -> dict[str, int]:
    """Replace the documents of a file by passages, unless that is done, and return counts.

    Returns:
        `num_documents`, `num_split_documents` (those cut into several), `num_passages`, and `num_bytes` of the
        passages' titles and texts.
    """
    with file.open_input() as stream, pq.ParquetFile(stream) as parquet:
        metadata = parquet.metadata.metadata or {}
        if _DONE in metadata:
            done: dict[str, int] = json.loads(metadata[_DONE])
            return done
        schema = split_schema(parquet.schema_arrow)
        counts = {"num_documents": 0, "num_split_documents": 0, "num_passages": 0, "num_bytes": 0}
        with file.open_output() as target, pq.ParquetWriter(target, schema, compression="zstd") as writer:
            for number in range(parquet.num_row_groups):
                group = parquet.read_row_group(number)
                starts = range(0, group.num_rows, _ROWS_AT_ONCE)
                writer.write_table(
                    pa.concat_tables(
                        _split_rows(group.slice(at, _ROWS_AT_ONCE), schema, splitting, counts) for at in starts
                    )
                )
            ours = {key.decode(): value.decode() for key, value in metadata.items() if key.startswith(b"readapt.")}
            writer.add_key_value_metadata(ours | {_DONE.decode(): json.dumps(counts)})
    return counts


def split_schema(documents: pa.Schema) -> pa.Schema:
    """Return the schema of passages: the schema of documents, with `parent_id` after `content_hash`."""
    at = documents.get_field_index("content_hash") + 1
    return documents.remove_metadata().insert(at, pa.field("parent_id", pa.string()))


def _split_rows(rows: pa.Table, schema: pa.Schema, splitting: Splitting, counts: dict[str, int]) -> pa.Table:
    pieces = splitting.split(rows["text"].to_pylist())
    parents = [at for at, own in enumerate(pieces) for _ in own or [""]]
    texts = [piece for own in pieces for piece in own or [""]]
    doc_ids = rows["doc_id"].to_pylist()
    titles = rows["title"].to_pylist()
    made = rows.take(pa.array(parents, pa.int64()))
    columns = {
        "doc_id": [
            each for doc_id, own in zip(doc_ids, pieces, strict=True) for each in piece_ids(doc_id, len(own) or 1)
        ],
        "text": texts,
        "content_hash": [content_hash(titles[at], text) for at, text in zip(parents, texts, strict=True)],
        "parent_id": [doc_ids[at] for at in parents],
    }
    counts["num_documents"] += rows.num_rows
    counts["num_split_documents"] += sum(len(own) > 1 for own in pieces)
    counts["num_passages"] += len(texts)
    counts["num_bytes"] += sum(num_bytes(titles[at]) + num_bytes(text) for at, text in zip(parents, texts, strict=True))
    arrays = [pa.array(columns[each.name], each.type) if each.name in columns else made[each.name] for each in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def total(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Sum the counts of several parts, by name; an empty dict if there are none."""
    found = list(counts)
    return {name: sum(each[name] for each in found) for name in found[0]} if found else {}
