"""Choose batch size, data shard size and the number of encoders per GPU, from the FLOPs and bytes of a model per token.

Encoders and `readapt plan` call the same functions, so a plan shows the batch that will run. The figures for GPUs are
computed, not measured.
"""

import math
from collections.abc import Collection
from typing import Final, NamedTuple

from readapt_ray import hardware
from readapt_ray.catalog.shapes import ModelShape

CPU_BATCH_TOKENS: Final = 1024
"""Default tokens per batch on a CPU, padding included.

Two cores of an AMD EPYC with 512, 2,048 and 4,096 tokens, against 1,024: all-MiniLM-L6-v2 ran .95, 1.01 and .92 times
as fast in float32 and .95, .98 and .96 in bfloat16, a model of bge-base's shape 1.04, .90 and .71 in float32 and 1.03,
.97 and .85 in bfloat16. One of Qwen3-Embedding-0.6B's shape computed as many positions per second with 512 to 2,048. No
size gains 5%, so it does not depend on the model.
"""
MIN_SHARD_ROWS: Final = 256
SHARDS: Final = 32
"""Least number of shards of a corpus, unless they would have fewer than MIN_SHARD_ROWS passages."""
_SHARD_S: Final = 45.0
_DEVICE_FLOPS: Final = {"GPU": 4.5e14, "CPU": 1.6e11}
"""FLOPs per second of a large GPU and of a CPU core with AMX, at the share of the peak that encoders reach."""
_SHARD_BYTES: Final = 256 << 20
"""Most bytes of a shard's texts, and of its vectors in float32."""
_ROW_BYTES: Final = 1024
"""Bytes that an encoder holds for a passage, however short and however small its vector: ids, hashes, Python objects."""
_LAYER_S: Final = 0.00025
"""Seconds that the host needs to start the kernels of a layer, for any number of tokens.

One core of an AMD EPYC took 0.17 ms (BERT), 0.20 (Mistral) and 0.26 (Qwen3) for layers so small that only Python and
torch's dispatch take time. What a launch on CUDA adds is not measured.
"""
_TOKEN_S: Final = 5e-8
"""Seconds of host work per token besides tokenising: batching, copying, writing.

The embed stage ran at .97 of the bare tokenizer's 575,000 tokens per second of a core (benchmarks/host_path.py).
"""
_LAUNCHES: Final = 4
"""A batch computes for at least this many times the time to start its kernels, so that the GPU never waits."""
_TILE_ROUNDS: Final = 8
"""Least rounds of tiles in a product with hidden-size outputs. The last round is partly idle: at most 1/8 is lost."""
_TILE: Final = 128 * 256
"""Results in one tile: tokens times outputs."""
_PROCESSORS: Final = 132
"""Multiprocessors of an H100; each computes a tile at a time."""
_STEP_TOKENS: Final = 1024
_MOST_TOKENS: Final = 131_072
"""Most tokens per batch. A tensor of a 7B's 14,336 numbers per token then has 1.9 x 10^9 numbers; above 2^31, kernels
need 64-bit indices."""
_MOST_PADDED_TOKENS: Final = 16_384
"""Most tokens of a batch of padded texts. A larger one mixes more lengths, and padding grows."""
_BATCH_SHARE: Final = 0.5
"""Part of the free memory that the activations of a batch may fill. The rest is for masks, fragments and vectors."""
_FLOAT32_SLOWDOWN: Final = 8
"""How many times longer a GPU takes for matrix products in float32 than in bfloat16."""
_MOST_PER_GPU: Final = 4
_USUAL_TOKENS: Final = 128


class TextSize(NamedTuple):
    """Mean length of a passage in tokens and in bytes."""

    num_tokens: float
    num_bytes: float


def shard_rows(num_passages: int, text: TextSize, shape: ModelShape, dimension: int, *, on_gpus: bool) -> int:
    """Return the default number of passages per data shard: some 45 seconds of work for one device.

    It is less if the texts or vectors of a shard would take over 256 MiB (so at most 262,144, as each passage counts as
    at least 1 KiB), or if the corpus would be cut into fewer than 32 shards; but at least 256.

    Args:
        num_passages: passages of the corpus.
        text: mean length of a passage.
        shape: shape of the retriever.
        dimension: numbers in a vector.
        on_gpus: whether the encoders compute on GPUs.
    """
    flops = text.num_tokens * shape.forward_flops(text.num_tokens)
    at_work = _SHARD_S * _DEVICE_FLOPS["GPU" if on_gpus else "CPU"] / flops
    in_memory = _SHARD_BYTES / max(text.num_bytes, 4.0 * dimension, _ROW_BYTES)
    return max(MIN_SHARD_ROWS, int(min(at_work, in_memory, num_passages / SHARDS)))


def encoders_per_gpu(shape: ModelShape) -> int:
    """Return how many encoder processes keep a GPU busy, so that it does not wait for the host: 1, 2 or 4.

    The host takes 0.25 ms per layer to start a batch, and 50 ns per token for the rest. That is 1.2 times
    the time that a large GPU computes with all-MiniLM-L6-v2 (119,808 tokens in 6 ms), .3 times with bge-base and .03
    times with a 7B.
    """
    tokens = wanted_gpu_tokens(shape, width=2)
    host_s = shape.num_layers * _LAYER_S + tokens * _TOKEN_S
    wanted = host_s / (tokens * _gpu_token_s(shape, width=2))
    return 1 if wanted <= 1 else 2 if wanted <= 2 else _MOST_PER_GPU


def activation_bytes(shape: ModelShape, width: int) -> int:
    """Return an upper bound of the bytes per token that a forward pass holds at its peak.

    The feed-forward part holds three tensors of its inner width (gate, up, their product) and some of the hidden width.
    Attention holds up to 16 of the hidden width (queries, keys and values, rotated and not). The bound is 1.0 to 1.9
    times what our encoders hold, counted on the meta device with packed texts. Padding adds a mask: a byte and a number
    per token and position of the longest text.

    Args:
        shape: of the encoder.
        width: bytes of a number.
    """
    return width * (8 * shape.hidden + max(3 * shape.intermediate, 8 * shape.hidden))


def resident_bytes(
    shape: ModelShape, dtype: str, *, is_16_bit: bool, packed_dtypes: Collection[str] = ()
) -> tuple[int, int]:
    """Return the bytes of an encoder's weights, and of the packed copies of its linear layers that make CPUs faster.

    Args:
        shape: shape of the encoder.
        dtype: the option: "auto", "float32", "bfloat16" or "float16".
        is_16_bit: whether that option means 16 bits on the device of the encoder.
        packed_dtypes: dtypes in which the encoder's CPU is faster with packed weights, see `packed_linear`; empty on a
            GPU.
    """
    from readapt_ray.nn import packed_linear

    low = "float16" if dtype == "float16" else "bfloat16"
    name, width = (low, 2) if is_16_bit else ("float32", 4)
    copies = packed_linear.copy_bytes(width * shape.num_linear_parameters) if name in packed_dtypes else 0
    return width * shape.num_parameters, copies


def free_for_batches(usable_bytes: float, weight_bytes: float) -> float:
    """Return the bytes of GPU memory that are left for batches after the weights and the CUDA process; 0 if none.

    Args:
        usable_bytes: what all tensors and the process may take: a GPU, or the encoder's part of it.
        weight_bytes: of the model, and of what is loaded later.
    """
    return max(0.0, usable_bytes - weight_bytes - hardware.GPU_PROCESS_BYTES)


def wanted_gpu_tokens(shape: ModelShape, *, width: int, is_packed: bool = True) -> int:
    """Return the tokens per batch that keep a large GPU busy, whatever its memory: a multiple of 1,024.

    At most 131,072 if texts are packed, else at most 16,384.

    Two things make small batches slow. The host must start the kernels of a batch (0.25 ms per layer) while the GPU
    computes the previous batch. And each matrix product is cut into tiles, of which an H100 computes 132 at a time. At
    450 TFLOP/s:

        all-MiniLM-L6-v2   4 x 1.5 ms / 50 ns per token = 119,000 tokens; 8 rounds of tiles: 90,112
        bge-base           4 x 3.0 ms / 390 ns = 31,000 tokens; 8 rounds: 45,056
        Mistral-7B         4 x 8.0 ms / 32 us = 1,000 tokens; 8 rounds: 8,448

    Reading the weights needs no term: in bfloat16 an H100 reads a number in 0.6 ps and computes with it in 4.4 fs per
    token, so with 1,344 tokens reading takes a tenth of the time of computing, in any model.

    Args:
        shape: shape of the encoder.
        width: bytes of a number: 2 or 4.
        is_packed: whether texts are packed, without padding.
    """
    started = _LAUNCHES * shape.num_layers * _LAYER_S / _gpu_token_s(shape, width)
    tiled = _TILE_ROUNDS * _PROCESSORS * _TILE / shape.hidden
    tokens = _STEP_TOKENS * math.ceil(max(started, tiled) / _STEP_TOKENS)
    return min(tokens, _MOST_TOKENS if is_packed else _MOST_PADDED_TOKENS)


def gpu_batch_tokens(shape: ModelShape, free_bytes: float, *, width: int, is_packed: bool = True) -> int:
    """Return the default tokens per batch on a GPU: as many as keep it busy, if half of the free memory holds them.

    Args:
        shape: shape of the encoder.
        free_bytes: memory for batches, see `free_for_batches`.
        width: bytes of a number: 2 or 4.
        is_packed: whether texts are packed, without padding.

    Returns:
        A multiple of 1,024; 1,024 if even that does not fit.
    """
    held = int(_BATCH_SHARE * free_bytes / activation_bytes(shape, width))
    return max(
        _STEP_TOKENS,
        min(wanted_gpu_tokens(shape, width=width, is_packed=is_packed), held // _STEP_TOKENS * _STEP_TOKENS),
    )


def _gpu_token_s(shape: ModelShape, width: int) -> float:
    """Return the seconds that a large GPU needs per token, in passages of usual length."""
    slower = 1 if width == 2 else _FLOAT32_SLOWDOWN
    return slower * shape.forward_flops(_USUAL_TOKENS) / _DEVICE_FLOPS["GPU"]
