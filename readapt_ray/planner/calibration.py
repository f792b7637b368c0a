"""Measure for a few seconds how fast a run's models embed and train on this machine (`readapt plan --calibrate`).

In: the run's models and the mean lengths of its passages. Out: rates, like those of finished runs. Token ids are
random, because only their number matters. It loads both models, and downloads them if they are not on this machine.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from readapt_ray.catalog import models
from readapt_ray.errors import InputError
from readapt_ray.planner.machines import Cluster
from readapt_ray.planner.rates import CPU, WORK_UNITS
from readapt_ray.planner.worker_memory import train_adapter
from readapt_ray.recipes.chain import RunConfig

logger = logging.getLogger("readapt_ray")

Measured = dict[tuple[str, str], tuple[float, str]]
"""(Stage, device) -> (work per second of one CPU or GPU, text that says where the rate is from)."""

_SECONDS: Final = 5.0
_TEXTS: Final = 64
_SOURCE: Final = "calibrated on this machine"


def check_device(own: str, cluster: Cluster) -> str:
    """Check that this machine has the device that the cluster computes with; return its name for rates.

    The name is CPU, or the kind of GPU without its memory size (A100 for A100-80GB).

    Args:
        own: kind of this machine's GPUs; empty if it has none.
        cluster: the cluster that the plan is for.

    Raises:
        InputError: the cluster computes with another device, so rates of this machine would not apply.
    """
    here, there = _speed_of(own), {_speed_of(group.gpu) for group in cluster.gpu_groups} or {CPU}
    if here not in there:
        raise InputError(
            f"--calibrate measures how fast this machine is ({here}), and the cluster computes with {' and '.join(sorted(there))}: run "
            f"it on a node of the cluster, or give a finished run with --measured"
        )
    return here


def _speed_of(gpu: str) -> str:
    return gpu.partition("-")[0] or CPU


def calibrate(
    run: RunConfig, configs: dict[str, Any], *, embed_tokens: float, train_tokens: float, device_name: str
) -> Measured:
    """Measure the rates of embed and train on one GPU of this machine, or per CPU.

    Each takes about five seconds, besides loading (and if needed downloading) its model. If torch sees no GPU, all CPU
    threads are measured and the rate is divided by their number.

    Args:
        run: config of the run, with its models.
        configs: options of the stages by name: "embed" and "train".
        embed_tokens: mean tokens per passage in embedding.
        train_tokens: mean tokens per passage in training.
        device_name: name of this machine's device, from `check_device`.

    Returns:
        FLOP per second of one GPU or CPU, with its source, by ("embed", device_name) and ("train", device_name).

    Raises:
        ModelError: a model cannot be loaded.
    """
    import torch

    from readapt_ray.retrieval.encoder import DTYPES, suitable_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    units = 1 if device.type == "cuda" else torch.get_num_threads()
    found: Measured = {}
    for stage, measure, num_tokens in (("embed", _embed, embed_tokens), ("train", _train, train_tokens)):
        config = configs[stage]
        dtype = suitable_dtype() if config.dtype == "auto" else config.dtype
        rate = measure(run, config, max(2, round(num_tokens)), DTYPES[dtype], device) / units
        found[stage, device_name] = rate, _SOURCE
        logger.info("plan: %s at %.3g %s/s on this machine", stage, rate * units, WORK_UNITS[stage])
    return found


def _embed(run: RunConfig, config: Any, num_tokens: int, dtype: Any, device: Any) -> float:
    """Measure the FLOP per second of encoding."""
    from readapt_ray.catalog.shapes import model_shape
    from readapt_ray.retrieval.encoder import DTYPES, Encoder

    name = next(each for each, value in DTYPES.items() if value == dtype)
    model = models.open_model(run.retriever)
    encoding = config.encoding or run.encoding or model.encoding
    encoder = Encoder.load(model, encoding=encoding, dtype=name, device=str(device), batch_tokens=config.batch_tokens)
    shape = model_shape(run.retriever)
    num_rows = _TEXTS
    if encoder.device.type == "cuda":  # two full batches: the CPU builds one while the GPU computes the other
        num_rows = max(_TEXTS, 2 * (encoder.batch_tokens // num_tokens))
    rows = _random_rows(num_tokens, encoder.network.config.vocab_size, num_rows)
    per_round = num_tokens * len(rows) * shape.forward_flops(num_tokens)
    return per_round * _rounds_per_second(lambda: encoder.encode_ids(rows))


def _train(run: RunConfig, config: Any, num_tokens: int, dtype: Any, device: Any) -> float:
    """Measure the FLOP per second of forward and backward passes, as in training."""
    import torch

    from readapt_ray.catalog.shapes import pretrained_shape
    from readapt_ray.stages.train import resolve
    from readapt_ray.training import objectives, packing, trainable
    from readapt_ray.training.speed import run_flops

    model, config = resolve(config, models.open_model(run.pretrained))
    shape = pretrained_shape(run.pretrained, config.objective)
    adapter = train_adapter(config, shape)
    stored = torch.float32 if adapter is None else dtype
    network = trainable.load_for_training(
        model, objective=config.objective, dtype=stored, device=device, zero_stage=0, base_dtype=config.base_dtype
    )
    trainable.make_trainable(network, adapter)
    trainable.reduce_memory(
        network, gradient_checkpointing=config.gradient_checkpointing, compile_layers=False, zero_stage=0
    )
    rows = _random_rows(num_tokens, network.config.vocab_size)[: max(1, config.micro_batch_tokens // num_tokens)]
    blocks = [packing.Block(np.asarray(row, np.int32), (len(row),), (place,)) for place, row in enumerate(rows)]
    batch = packing.collate(blocks, pad_id=0).to(device)

    def step() -> None:
        torch.autograd.backward(objectives.loss_sum(network, batch))
        network.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work = run_flops(
        shape,
        adapter,
        num_tokens=num_tokens * len(rows),
        num_passages=len(rows),
        num_steps=1,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    return work * _rounds_per_second(step)


def _random_rows(num_tokens: int, vocab_size: int, num_rows: int = _TEXTS) -> list[list[int]]:
    rows: list[list[int]] = np.random.default_rng(0).integers(0, vocab_size, (num_rows, num_tokens)).tolist()
    return rows


def _rounds_per_second(work: Callable[[], Any]) -> float:
    """Repeat some work for five seconds; return the repetitions per second, without the first, which warms up."""
    work()
    started_s = time.monotonic()
    num_rounds = 0
    while time.monotonic() - started_s < _SECONDS:
        work()
        num_rounds += 1
    return num_rounds / (time.monotonic() - started_s)
