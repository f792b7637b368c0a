"""Tokenise data shards: turn the texts in a row of Ray Data into token ids.

With GPUs, or cores that no encoder uses, Ray Data tasks tokenise on any idle core. If the encoders use all cores, each
tokenises its own shards: a task would take a core from them, and load the tokenizer once more. A text that occurs twice
in a shard is tokenised once. A core tokenises about 15,000 passages of 100 tokens per second.
"""

import functools
import itertools
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import open_model
from readapt_ray.cluster import on_worker
from readapt_ray.cluster.embed_job import EmbedJob, cell, shard_row
from readapt_ray.errors import CorpusError
from readapt_ray.retrieval.shard_plan import first_rows
from readapt_ray.retrieval.tokenization import TextTokenizer

TokensAndLosses = tuple[list[list[int]], list[int]]
"""Token ids of each text, and how many tokens truncation removed from it."""


def tokenize_in_task(shard: pa.Table, job: EmbedJob) -> pa.Table:
    """Tokenise a shard in a Ray Data task, with a tokenizer that the process keeps; see `tokenize_shard`."""

    def tokenize(texts: list[str], titles: list[str]) -> TokensAndLosses:
        tokenizer = _tokenizer(job.model_name, job.encoding.model_dump_json(), job.tokenizer, job.driver_node)
        return tokenizer.ids_and_losses(texts, "passage", titles)

    return tokenize_shard(shard, tokenize)


def tokenize_shard(shard: pa.Table, tokenize: Callable[[list[str], list[str]], TokensAndLosses]) -> pa.Table:
    """Tokenise the distinct texts of a shard that have no vector yet.

    Args:
        shard: a row with the cells doc_id, title, text and hashes; also earlier, if there are earlier vectors.
        tokenize: turns texts and their titles into token ids, and the number of tokens that truncation removed.

    Returns:
        A row with the cells doc_id and hashes of all passages; lengths, losses (truncated tokens) and tokens of the
        distinct texts; and vector: for each passage, the index of its distinct text, or -1 - e to copy earlier row e.

    Raises:
        CorpusError: a passage gives no token.
    """
    hashes = cell(shard, "hashes").to_numpy().reshape(-1, 2)
    first = first_rows(hashes)
    earlier = cell(shard, "earlier").to_numpy() if "earlier" in shard.column_names else np.full(len(first), -1)
    fresh = np.unique(first[earlier[first] < 0])
    texts, titles, doc_ids = (cell(shard, name).take(pa.array(fresh)) for name in ("text", "title", "doc_id"))
    ids, losses = tokenize(texts.to_pylist(), [title or "" for title in titles.to_pylist()]) if len(fresh) else ([], [])
    lengths = np.fromiter(map(len, ids), np.int32, len(ids))
    if len(lengths) and not lengths.all():
        doc_id = doc_ids[int(np.flatnonzero(lengths == 0)[0])].as_py()
        raise CorpusError(f"passage {doc_id!r} gives no token, so it has no vector; leave it out of the corpus")
    tokens = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum()))
    vector = np.where(earlier[first] < 0, np.searchsorted(fresh, first), -1 - earlier[first])
    cells = {"doc_id": cell(shard, "doc_id"), "hashes": cell(shard, "hashes"), "vector": pa.array(vector)}
    cells |= {"lengths": pa.array(lengths), "losses": pa.array(losses, pa.int64()), "tokens": pa.array(tokens)}
    return shard_row(shard["number"][0].as_py(), **cells)


@functools.lru_cache(maxsize=2)
def _tokenizer(model_name: str, encoding: str, expected: str, driver_node: str) -> TextTokenizer:
    """Load a tokenizer, without weights, and check that it is the driver's."""
    on_worker.check_node()
    model = open_model(model_name, with_weights=False)
    on_worker.check_same_model(model_name, lambda: model.tokenizer_fingerprint, {expected}, driver_node=driver_node)
    return TextTokenizer(model.tokenizer, Encoding.model_validate_json(encoding))
