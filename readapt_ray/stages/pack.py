"""The pack stage: tokenise passages and pack them into numbered token blocks.

In: a corpus and a model's tokenizer. Out: one file of blocks per file of passages. A Ray Data task makes each file and
writes it as a whole, so a killed run resumes with the missing files. Memory: the tokens of one file per task, and in
every task the ids to leave out or to take.
"""

import functools
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact, Workspace
from readapt_ray.catalog import models, shapes
from readapt_ray.cluster import connection, on_worker, placement
from readapt_ray.cluster.corpus_comparison import opened
from readapt_ray.cluster.pack_options import PackOptions
from readapt_ray.config import StageConfig
from readapt_ray.errors import CorpusError, CorruptFileError, ModelError
from readapt_ray.progress import amount
from readapt_ray.retrieval import footers, truncation
from readapt_ray.retrieval.corpus_changes import content_hashes, is_known, known_contents
from readapt_ray.retrieval.passage_files import PassageFiles
from readapt_ray.retrieval.vector_files import METADATA_KEY
from readapt_ray.seeds import random_generator
from readapt_ray.storage import Location
from readapt_ray.training.block_ledger import BlockLedger, block_file

logger = logging.getLogger("readapt_ray")

_BLOCKS_PER_ROW_GROUP = 256
_TEXTS_PER_CALL = 1024
_FILE_NUMBER_SHIFT = 32


class _Choice(NamedTuple):
    """The choice of passages to pack."""

    lists: dict[str, frozenset[str]]
    """The doc_ids of the options `exclude` and `only`."""
    withheld: frozenset[int]
    """Numbers of passages that are withheld from training."""
    known: NDArray[np.uint64] | None
    """Content hashes of the passages in `new_since`, which are left out; None without it."""

    def seen(self, passages: pa.Table) -> NDArray[np.bool_]:
        """Return for each row whether `new_since` has a passage of the same content."""
        if self.known is None:
            return np.zeros(passages.num_rows, bool)
        return is_known(self.known, content_hashes(passages))


class PackConfig(PackOptions, StageConfig):
    """The options of `readapt pack`."""

    pretrained: str
    """Model whose tokenizer is used: a catalog name, a folder, a GGUF file, a URI or a hub id."""
    corpus: str
    """Passages: the output of `readapt ingest`."""
    inputs: ClassVar[frozenset[str]] = frozenset({"pretrained", "corpus", "exclude", "only", "new_since"})


def pack(config: PackConfig) -> Artifact:
    """Tokenise the passages of a corpus and pack them into token blocks.

    A killed run resumes with the missing files. Does nothing if the output is complete and of the same options and
    inputs.

    Raises:
        ArtifactMissingError: the corpus, or `new_since`, is not a complete output of ingest.
        CorpusError: `exclude` or `only` cannot be read, or names no passage of the corpus; or no passage is left.
        CorruptFileError: passages of the corpus are missing.
        PlacementError: no node of the cluster has a CPU.
        ModelError: the tokenizer cannot be read or has no end token, or `block_tokens` exceeds the model's positions.
        ArtifactConflictError: the output holds something else, or a result of other options and `overwrite` is not set.
    """
    from readapt_ray.sources.judgements import read_doc_ids

    corpus = artifacts.open_artifact(config.corpus, "ingest")
    model = models.open_model(config.pretrained, with_weights=False)
    config = _as_made(config, model) or _checked(config, model)
    inputs = {"corpus": corpus.fingerprint, "pretrained": model.tokenizer_fingerprint}
    lists = {name: read_doc_ids(uri) for name in ("exclude", "only") if (uri := getattr(config, name)) is not None}
    inputs |= {name: artifacts.fingerprint(sorted(ids)) for name, ids in lists.items()}
    earlier = None
    if config.new_since is not None:
        earlier = artifacts.open_artifact(config.new_since, "ingest")
        inputs["new_since"] = earlier.fingerprint
    return artifacts.produce(
        "pack",
        config,
        inputs=inputs,
        work=lambda workspace: _pack(config, model, corpus, lists, workspace, earlier=earlier),
    )


def _as_made(config: PackConfig, model: models.OpenModel) -> PackConfig | None:
    """Return the config with the `block_tokens` of a finished output of the same model; None if there is none."""
    made = None if config.overwrite else artifacts.read_manifest(config.output)
    if made is None or made.details.get("model_config") != artifacts.fingerprint(model.config):
        return None
    if "block_tokens" in config.model_fields_set and config.block_tokens != made.config["block_tokens"]:
        return None
    return config.model_copy(update={"block_tokens": made.config["block_tokens"]})


def _checked(config: PackConfig, model: models.OpenModel) -> PackConfig:
    """Check the tokenizer, and return the config with `block_tokens` limited to the model's positions."""
    from readapt_ray.training import packing

    if packing.end_id(model.tokenizer) is None:
        raise ModelError(
            f"the tokenizer of {config.pretrained!r} has no end token (eos_token or sep_token); set one in its tokenizer_config.json"
        )
    return within_positions(config, model)


def within_positions(config: PackConfig, model: models.OpenModel) -> PackConfig:
    """Return the config with the default of `block_tokens` lowered to the model's number of positions, if need be.

    Otherwise, also if the model has no fixed number of positions, the config is returned as it is.

    Raises:
        ModelError: the user gave `block_tokens`, and it exceeds the model's positions.
    """
    positions = shapes.usable_positions(model.config, model.name)
    if positions is None or config.block_tokens <= positions:
        return config
    if "block_tokens" not in config.model_fields_set:
        return config.model_copy(update={"block_tokens": positions})
    raise ModelError(
        f"block_tokens = {config.block_tokens} is more than the {positions} positions of {config.pretrained!r}; give at most {positions}"
    )


def _pack(
    config: PackConfig,
    model: models.OpenModel,
    corpus: Artifact,
    lists: dict[str, frozenset[str]],
    workspace: Workspace,
    *,
    earlier: Artifact | None,
) -> None:
    connection.connect()
    placement.check_placement(1, {"CPU": 1}, who="tasks")
    if lists:
        passages = PassageFiles.open(corpus.uri)
        lists = {name: passages.passage_ids(ids) for name, ids in lists.items()}
    parts, num_passages = _parts(corpus, lists)
    withheld = withheld_numbers(config.withhold, num_passages)
    job = {
        "pretrained": on_worker.model_name(model),
        "tokenizer": model.tokenizer_fingerprint,
        "mode": config.mode,
        "block_tokens": config.block_tokens,
    }
    blocks = on_worker.absolute(workspace.location) / "blocks"
    connection.check_seen_by_all(blocks)
    ledger = BlockLedger(workspace.location)
    ledger.find()
    pending = [part for part in parts if part["index"] not in ledger.done]
    try:
        if pending:
            known = None if earlier is None else known_contents(opened(earlier, "passages"))
            for row in _packed(pending, blocks, job, _Choice(lists, frozenset(withheld), known)):
                ledger.record(row)
                workspace.progress(ledger.total()["num_passages"], num_passages, unit="passages")
    finally:
        ledger.save()
    counts = ledger.total()
    if lists or withheld or earlier is not None:
        counts["num_withheld_passages"] = num_passages - counts["num_passages"]
        if not counts["num_passages"]:
            raise CorpusError(
                f"exclude = {config.exclude!r}, only = {config.only!r}, new_since = {config.new_since!r} and withhold = "
                f"{config.withhold} leave none of the {amount(num_passages, 'passages')} of {config.corpus!r}; check that the "
                "lists name its doc_ids, give an earlier state, or withhold fewer"
            )
    workspace.counts, workspace.details = counts, {"truncation": _tell_truncation(counts, config.block_tokens, model)}
    workspace.details["withheld"] = withheld
    workspace.details["model_config"] = artifacts.fingerprint(model.config)


def _packed(
    parts: list[dict[str, Any]], blocks: Location, job: dict[str, Any], choice: _Choice
) -> Iterator[dict[str, int]]:
    """Pack files of passages in Ray tasks; yield the counts of each file."""
    import ray
    import ray.data

    shared = ray.put(choice)
    dataset = ray.data.from_items(parts, override_num_blocks=len(parts))
    dataset.context.execution_no_progress_timeout_s = -1
    dataset = dataset.map(lambda part: _pack_file(part, blocks.uri, job, ray.get(shared)))
    try:
        yield from dataset.iter_rows()
    except ray.exceptions.RayError as error:
        raise connection.cause_of(error) from None


def withheld_numbers(withhold: int, num_passages: int) -> list[int]:
    """Draw the numbers of the passages to withhold, sorted; the same in each call with the same arguments.

    Args:
        withhold: how many to draw; all passages if there are fewer.
        num_passages: passages in the corpus, numbered from 0 in the order of its files.
    """
    drawn = random_generator(0, "withheld passages").choice(num_passages, min(withhold, num_passages), replace=False)
    return sorted(drawn.tolist())


def _tell_truncation(counts: Mapping[str, int], block_tokens: int, model: models.OpenModel) -> dict[str, Any]:
    lost = truncation.truncation(
        num_texts=counts["num_passages"],
        num_truncated=counts["num_truncated_passages"],
        num_tokens=counts["num_tokens"],
        num_lost=counts["num_lost_tokens"],
        max_tokens=block_tokens,
    )
    is_all = block_tokens == shapes.usable_positions(model.config, model.name)
    advice = f"{model.name} has no more positions: " if is_all else "raise block_tokens, or "
    truncation.warn_of_loss("pack", lost, f"{advice}split long passages with ingest's split_tokens")
    return lost


def _parts(corpus: Artifact, lists: dict[str, frozenset[str]]) -> tuple[list[dict[str, Any]], int]:
    """List the files of passages, each with the number of its first passage, and count all passages."""
    parts, num_passages = [], 0
    wanted = {name: pa.array(list(ids), pa.string()) for name, ids in lists.items()}
    num_found = dict.fromkeys(lists, 0)
    folder = on_worker.absolute(corpus.location / "passages")
    rows = footers.row_counts(footers.listed_footers(corpus.location, "passages"))
    survey = functools.partial(_survey, wanted=wanted)
    surveyed = footers.map_in_threads(survey, [folder / name for name, _ in rows] if wanted else [])
    for index, (name, num_rows) in enumerate(rows):
        parts.append({"index": index, "file": (folder / name).uri, "first_number": num_passages})
        num_passages += num_rows
    for in_file in surveyed:
        num_found = {name: count + in_file[name] for name, count in num_found.items()}
    expected = corpus.manifest.counts["num_passages"]
    if num_passages != expected:
        raise CorruptFileError(
            f"{corpus.uri!r} holds {amount(num_passages, 'passages')} in {amount(len(parts), 'files')}, but its manifest "
            f"counts {expected:,}; "
            f"copy the whole folder again, or remove it and run `readapt ingest` again"
        )
    for name, found in num_found.items():
        _check_found(name, found, len(lists[name]), corpus)
    return parts, num_passages


def _survey(file: Location, wanted: Mapping[str, pa.Array]) -> dict[str, int]:
    """Count the passages of a file that each list of doc_ids names."""
    found = dict.fromkeys(wanted, 0)
    with file.open_input() as stream, pq.ParquetFile(stream) as opened:
        for batch in opened.iter_batches(columns=["doc_id"]):
            for name, ids in wanted.items():
                found[name] += pc.sum(pc.is_in(batch["doc_id"], value_set=ids)).as_py() or 0
    return found


@functools.lru_cache(maxsize=1)
def _tokenizer(pretrained: str, tokenizer_fingerprint: str, process: int) -> Any:
    """Load a tokenizer once per process."""
    del tokenizer_fingerprint, process  # keys of the cache: it must not serve another tokenizer or a forked process
    return models.open_model(pretrained, with_weights=False).tokenizer


def _check_found(name: str, num_found: int, num_listed: int, corpus: Artifact) -> None:
    if not num_found:
        raise CorpusError(
            f"{name} lists {amount(num_listed, 'doc_ids')}, and {corpus.uri!r} has none of them; give doc_ids of its passages, or "
            f"leave --{name} out"
        )
    if num_found < num_listed:
        logger.warning(
            "pack: %d of the %d doc_ids of %s are not in the corpus", num_listed - num_found, num_listed, name
        )


def _pack_file(
    part: dict[str, Any],
    blocks_uri: str,
    job: dict[str, Any],
    choice: _Choice,
) -> dict[str, int]:
    """Tokenise and pack one file of passages, unless its blocks are written; return its counts."""
    from readapt_ray.training import packing

    target = Location(blocks_uri) / block_file(part["index"])
    if not target.is_file():
        tokenizer = _tokenizer(job["pretrained"], job["tokenizer"], os.getpid())
        with Location(part["file"]).open_input() as stream:
            passages = pq.read_table(stream, columns=["doc_id", "title", "text"])
        is_seen = choice.seen(passages)
        losses: list[int] = []

        def numbered() -> Any:
            for start in range(0, passages.num_rows, _TEXTS_PER_CALL):
                rows = passages.slice(start, _TEXTS_PER_CALL)
                columns = (rows[name].to_pylist() for name in ("doc_id", "title", "text"))
                taken = [
                    (number, f"{title} {text}".strip())
                    for number, (doc_id, title, text) in enumerate(
                        zip(*columns, strict=True), part["first_number"] + start
                    )
                    if number not in choice.withheld
                    and not is_seen[number - part["first_number"]]
                    and doc_id not in choice.lists.get("exclude", ())
                    and doc_id in choice.lists.get("only", (doc_id,))
                ]
                ids, lost = packing.passage_ids(tokenizer, [text for _, text in taken], max_tokens=job["block_tokens"])
                losses.extend(lost)
                yield from zip((number for number, _ in taken), ids, strict=True)

        made = list(packing.pack(numbered(), mode=job["mode"], block_tokens=job["block_tokens"]))
        table = packing.blocks_to_table(made, part["index"] << _FILE_NUMBER_SHIFT)
        truncated = {"num_truncated_passages": sum(map(bool, losses)), "num_lost_tokens": sum(losses)}
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps(truncated)})
        with target.open_output() as stream:
            pq.write_table(table, stream, row_group_size=_BLOCKS_PER_ROW_GROUP, compression="zstd")
            return {"index": part["index"], **_counts(table, stream.tell())}
    return {"index": part["index"], **_read_counts(target)}


def _read_counts(target: Location) -> dict[str, int]:
    with target.open_input() as stream:
        table = pq.read_table(stream, columns=["passage_lengths"])
        return _counts(table, stream.seek(0, io.SEEK_END))


def _counts(table: pa.Table, num_bytes: int) -> dict[str, int]:
    """Count the blocks, passages, tokens and truncations in a file of blocks."""
    truncated = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
    lengths: pa.Array = table["passage_lengths"]
    flat = pc.list_flatten(lengths)
    return {
        "num_blocks": len(lengths),
        "num_passages": len(flat),
        "num_tokens": pc.sum(flat).as_py() or 0,
        "num_truncated_passages": truncated.get("num_truncated_passages", 0),
        "num_lost_tokens": truncated.get("num_lost_tokens", 0),
        "num_bytes": num_bytes,
    }
