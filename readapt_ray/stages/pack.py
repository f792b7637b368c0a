"""pack: passages to numbered token blocks.

Each passages file becomes one blocks file, tokenised in a Ray Data task of its own and written whole;
after a kill only the files that are missing are made. Memory is that of one file's tokens a task.
"""

from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact, Workspace
from readapt_ray.catalog import models
from readapt_ray.config import StageConfig
from readapt_ray.errors import CorpusError, ModelError
from readapt_ray.stages import cluster
from readapt_ray.storage import Location

_BLOCKS_PER_ROW_GROUP = 256
_TEXTS_PER_CALL = 1024
_FILE_NUMBER_SHIFT = 32


class PackConfig(StageConfig):
    """Options of pack."""

    pretrained: str
    """MODEL whose tokenizer is used: catalog name, folder, URI or hub id."""
    corpus: str
    """Passages: the output of `readapt ingest`."""
    mode: str = Field(default="passage", pattern="^(passage|packed)$")
    """passage: a block is one passage, as in the paper; packed: passages end to end, none seeing another."""
    block_tokens: int = Field(default=1024, ge=8)
    """Longest passage, and in packed mode the length of a block, in tokens."""

    inputs: ClassVar[frozenset[str]] = frozenset({"pretrained", "corpus"})


def pack(config: PackConfig) -> Artifact:
    """Turn passages into token blocks.

    Raises:
        ArtifactMissingError: the corpus is not a complete output of ingest.
        ModelError: the tokenizer cannot be read, has no end token, or the block is longer than the model's positions.
    """
    corpus = artifacts.open_artifact(config.corpus, "ingest")
    model = models.find_model(config.pretrained)
    tokenizer = models.load_tokenizer(model)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {config.pretrained!r} has no end token (eos_token); set one in its tokenizer_config.json"
        )
    positions = model.read_json("config.json").get("max_position_embeddings")
    if positions and config.block_tokens > positions:
        raise ModelError(
            f"block_tokens = {config.block_tokens} is more than the {positions} positions of {config.pretrained!r}; give at most {positions}"
        )
    inputs = {"corpus": corpus.fingerprint, "pretrained": _tokenizer_fingerprint(model)}
    return artifacts.produce("pack", config, inputs=inputs, work=lambda workspace: _pack(config, corpus, workspace))


def _tokenizer_fingerprint(model: models.Model) -> str:
    folder = Location(str(model.folder))
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model", "special_tokens_map.json")
    return artifacts.fingerprint({name: (folder / name).sha256() for name in names if (folder / name).is_file()})


def _pack(config: PackConfig, corpus: Artifact, workspace: Workspace) -> None:
    cluster.connect()
    import ray.data

    files = (corpus.location / "passages").files(".parquet")
    if not files:
        raise CorpusError(f"{config.corpus!r} holds no passages")
    parts, first_number = [], 0
    for index, file in enumerate(files):
        with file.open_input() as stream:
            rows = pq.ParquetFile(stream).metadata.num_rows
        parts.append({"index": index, "file": file.uri, "first_number": first_number})
        first_number += rows
    job = {"pretrained": config.pretrained, "mode": config.mode, "block_tokens": config.block_tokens}
    blocks = workspace.location / "blocks"
    dataset = ray.data.from_items(parts, override_num_blocks=len(parts))
    dataset = dataset.map(lambda part: _pack_file(part, blocks.uri, job))
    counts = {"num_blocks": 0, "num_passages": 0, "num_tokens": 0, "num_cut_passages": 0}
    for row in dataset.iter_rows():
        counts = {name: counts[name] + row[name] for name in counts}
        workspace.progress(counts["num_passages"], first_number, unit="passages")
    workspace.counts = counts


def _pack_file(part: dict[str, Any], blocks_uri: str, job: dict[str, Any]) -> dict[str, int]:
    """Tokenise and pack one passages file, unless its blocks are there; the counts of it."""
    from readapt_ray.training import packing

    target = Location(blocks_uri) / f"part-{part['index']:05d}.parquet"
    if not target.is_file():
        tokenizer = models.load_tokenizer(models.find_model(job["pretrained"]))
        with Location(part["file"]).open_input() as stream:
            passages = pq.read_table(stream, columns=["title", "text"])

        def numbered() -> Any:
            for start in range(0, passages.num_rows, _TEXTS_PER_CALL):
                rows = passages.slice(start, _TEXTS_PER_CALL)
                pairs = zip(rows["title"].to_pylist(), rows["text"].to_pylist(), strict=True)
                texts = [f"{title} {text}".strip() for title, text in pairs]
                ids = packing.passage_ids(tokenizer, texts, max_tokens=job["block_tokens"])
                yield from ((part["first_number"] + start + offset, tokens) for offset, tokens in enumerate(ids))

        made = list(packing.pack(numbered(), mode=job["mode"], block_tokens=job["block_tokens"]))
        table = packing.blocks_to_table(made, part["index"] << _FILE_NUMBER_SHIFT)
        with target.open_output() as stream:
            pq.write_table(table, stream, row_group_size=_BLOCKS_PER_ROW_GROUP, compression="zstd")
    return _counts(target, job["block_tokens"])


def _counts(target: Location, block_tokens: int) -> dict[str, int]:
    import pyarrow.compute as pc

    with target.open_input() as stream:
        lengths: pa.Array = pq.read_table(stream, columns=["passage_lengths"])["passage_lengths"]
    flat = pc.list_flatten(lengths)
    return {
        "num_blocks": len(lengths),
        "num_passages": len(flat),
        "num_tokens": pc.sum(flat).as_py() or 0,
        "num_cut_passages": pc.sum(pc.equal(flat, block_tokens)).as_py() or 0,
    }
