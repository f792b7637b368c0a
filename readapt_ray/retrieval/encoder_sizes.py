"""Choose the size of batches and data shards, and how many encoders share a GPU, by what a model computes per token."""

from typing import Final, NamedTuple

from readapt_ray.catalog.shapes import ModelShape

CPU_BATCH_TOKENS: Final = 1024
GPU_BATCH_TOKENS: Final = 16_384
"""Most tokens of a batch, padding included, unless the options say."""
MIN_SHARD_ROWS: Final = 256
SHARDS: Final = 32
"""A corpus has at least so many shards, where they are not smaller than the smallest."""
_SHARD_S: Final = 45.0
_DEVICE_FLOPS: Final = {"GPU": 4.5e14, "CPU": 1.6e11}
"""FLOPs per second of a large GPU and of a CPU core with AMX, at the share of the peak that encoders reach."""
_SHARD_BYTES: Final = 256 << 20
"""Most bytes of a shard's texts, and of its vectors in float32."""
_HOST_S: Final = 0.004
"""Seconds of CPU time per batch: grouping, launching kernels, copying vectors. Estimated, not measured."""
_MOST_PER_GPU: Final = 4
_USUAL_TOKENS: Final = 128


class TextSize(NamedTuple):
    """Mean length of a passage."""

    num_tokens: float
    num_bytes: float


def shard_rows(num_passages: int, text: TextSize, shape: ModelShape, dimension: int, *, on_gpus: bool) -> int:
    """Return the passages of a data shard where the options do not say: some 45 seconds of a device's work.

    Args:
        num_passages: of the corpus.
        text: of a passage, on average.
        shape: of the retriever.
        dimension: numbers of a vector.
        on_gpus: whether the encoders compute on GPUs.
    """
    flops = text.num_tokens * shape.forward_flops(text.num_tokens)
    at_work = _SHARD_S * _DEVICE_FLOPS["GPU" if on_gpus else "CPU"] / flops
    in_memory = _SHARD_BYTES / max(text.num_bytes, 4.0 * dimension)
    return max(MIN_SHARD_ROWS, int(min(at_work, in_memory, num_passages / SHARDS)))


def encoders_per_gpu(shape: ModelShape) -> int:
    """Return how many encoders it takes that a GPU does not wait for their hosts: 1, 2 or 4.

    A batch of 16,384 tokens takes 0.8 ms for all-MiniLM-L6-v2 at 45% of an H100's peak, and 6 ms for bge-base.
    """
    batch_s = GPU_BATCH_TOKENS * shape.forward_flops(_USUAL_TOKENS) / _DEVICE_FLOPS["GPU"]
    wanted = _HOST_S / batch_s
    return 1 if wanted <= 1 else 2 if wanted <= 2 else _MOST_PER_GPU
