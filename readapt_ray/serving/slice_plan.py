"""Deal the shards of an index round robin to processes, and estimate the memory of each process.

The estimate reads only manifests and footers. It does not influence which process gets which shards.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from readapt_ray import ranged_reads
from readapt_ray.artifacts import open_artifact
from readapt_ray.errors import InputError
from readapt_ray.retrieval.footers import map_in_threads
from readapt_ray.serving.options import VersionConfig
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.retrieval.index_files import ShardRecord
    from readapt_ray.retrieval.vector_index import VectorIndex

_ID_BYTES = 160
"""Bytes per vector beside the shard's files: doc_id as a Python object, positions and content hash."""

_COPIES = 4
"""Number of copies of a chunk of new vectors in memory while it is read from a file."""


class PlannedSlice(NamedTuple):
    """A part of an index, which one process serves."""

    deployment: str
    """Name of the Ray Serve deployment."""
    shards: tuple[str, ...]
    """Names of its shards."""
    num_vectors: int
    """Number of vectors that are not deleted."""
    num_bytes: int
    """Bytes of memory that Ray reserves, so that a slice never starts on a node without room for it."""


def planned_slices(config: VersionConfig) -> list[PlannedSlice]:
    """Deal the shards of a version's index round robin to `index_actors` slices, and estimate the memory of each.

    There are never more slices than shards. Without an index, the list is empty.

    Raises:
        InputError: `num_gpus_per_index_actor` is set with an index that GPUs cannot search, or with `new_vectors`.
    """
    if not config.index:
        return []
    from readapt_ray.retrieval.index_files import words_file
    from readapt_ray.retrieval.vector_index import VectorIndex

    index = VectorIndex.open(config.index)
    records = index.records
    is_on_gpu = config.num_gpus_per_index_actor > 0
    if is_on_gpu:
        _check_for_gpu(config, records)
    names = {words_file(index.folder, name).name: name for name in index.words}
    sizes = dict(index.folder.listing(".npz")) if names else {}
    extra = {each.name: each.num_vectors * _ID_BYTES for each in records}
    for file, name in names.items():
        extra[name] += sizes[file].size if file in sizes else 0
    columns = _column_bytes(config.corpus) / max(1, sum(each.num_vectors for each in records))
    dealt = [records[first :: config.index_actors] for first in range(min(config.index_actors, len(records)))]
    return [
        PlannedSlice(
            deployment=f"index-{number}",
            shards=tuple(each.name for each in part),
            num_vectors=sum(each.num_vectors - each.num_deleted for each in part),
            # With a GPU, files are mapped only to be copied there, and the kernel can reclaim their pages at any time.
            num_bytes=sum(each.num_bytes * (not is_on_gpu) + extra[each.name] for each in part)
            + round(columns * sum(each.num_vectors for each in part))
            + _read_bytes(index.folder, part)
            + _new_vector_bytes(config, index, sum(each.num_vectors for each in part)),
        )
        for number, part in enumerate(dealt)
    ]


def _check_for_gpu(config: VersionConfig, records: Sequence["ShardRecord"]) -> None:
    from readapt_ray.retrieval.device_index import FACTORIES

    asked = f"num_gpus_per_index_actor = {config.num_gpus_per_index_actor:g}"
    other = next((each.factory for each in records if each.num_vectors and each.factory not in FACTORIES), None)
    if other is not None:
        raise InputError(
            f"{asked}, but the index {config.index!r} is of kind {other}, and GPUs search only flat indexes of float32 or "
            f"float16 vectors; leave num_gpus_per_index_actor out, or make one by `readapt index --kind flat`"
        )
    if config.new_vectors:
        raise InputError(
            f"{asked}, but while passages move to new_vectors the CPU searches; leave num_gpus_per_index_actor out until all have "
            f"moved, or serve the old index without new_vectors"
        )


def _read_bytes(folder: Location, records: Sequence["ShardRecord"]) -> int:
    """Return the extra bytes of memory that the largest shards take while they are read at once.

    A shard that is not mapped takes twice its size. A shard that is copied to the node takes the bytes in transfer.
    """
    from readapt_ray.serving.index_slice import READ_AT_ONCE, is_mapped

    each = [
        2 * shard.num_bytes * (not is_mapped(shard, records))
        + min(shard.num_bytes, ranged_reads.MAX_HELD_BYTES) * (not folder.is_local)
        for shard in records
    ]
    return sum(sorted(each)[-READ_AT_ONCE:])


def _new_vector_bytes(config: VersionConfig, index: "VectorIndex", num_vectors: int) -> int:
    """Return the bytes for new vectors of all passages of a slice, and for the chunk of a file that is being read."""
    if not (config.new_vectors and config.bridge):
        return 0
    from readapt_ray.retrieval.bridge import Bridge
    from readapt_ray.serving.moving_slice import num_bytes
    from readapt_ray.serving.new_vectors import CHUNK_ROWS, vector_factory

    dimension = int(Bridge.open(config.bridge).new_encoder["dimension"])
    chunk_bytes = 4 * dimension * min(CHUNK_ROWS, num_vectors)
    return num_bytes(num_vectors, dimension, vector_factory(index)) + _COPIES * chunk_bytes


def _column_bytes(corpus: str | None) -> int:
    """Return the bytes, uncompressed, of the columns of a corpus that searches can be filtered by."""
    from readapt_ray.retrieval.kept_columns import kept_columns
    from readapt_ray.retrieval.passage_files import opened

    files = (open_artifact(corpus, "ingest").location / "passages").files(".parquet") if corpus else []
    names = set(kept_columns(files))

    def num_bytes(file: Location) -> int:
        with opened(file) as parquet:
            footer = parquet.metadata
        groups = map(footer.row_group, range(footer.num_row_groups))
        chunks = (group.column(place) for group in groups for place in range(group.num_columns))
        return sum(each.total_uncompressed_size for each in chunks if each.path_in_schema.split(".")[0] in names)

    return sum(map_in_threads(num_bytes, files)) if names else 0
