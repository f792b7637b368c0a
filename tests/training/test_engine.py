"""The engine's state, and what ZeRO-3 loads, in processes of their own."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from readapt_ray.catalog.models import open_model
from readapt_ray.nn.quantized import quantize
from readapt_ray.storage import Location
from readapt_ray.training import dora
from readapt_ray.training.checkpoints import DataOrder
from readapt_ray.training.engine import DeepSpeedEngine, Optimization
from readapt_ray.training.partitioned import gathered
from readapt_ray.training.steps import StepWork, run_steps
from readapt_ray.training.trainable import load_for_training
from tests import factories, families

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.attempt"])
OPTIMIZATION = {"learning_rate": 1e-2, "weight_decay": 0.0, "warmup_fraction": 0.0, "max_gradient_norm": 1.0, "seed": 0}


@pytest.mark.parametrize(("zero_stage", "base_dtype"), [(0, "auto"), (2, "auto"), (3, "auto"), (0, "nf4"), (2, "int8")])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_loaded_state_takes_the_next_step_as_if_nothing_had_been(
    tmp_path: Path, device: str, zero_stage: int, base_dtype: str
) -> None:
    in_a_process(step_twice_and_once, tmp_path, device, zero_stage, base_dtype)
    calm, resumed = torch.load(tmp_path / "calm.pt"), torch.load(tmp_path / "resumed.pt")
    assert calm.keys() == resumed.keys() and len(calm) == 9
    assert all(torch.equal(calm[name], resumed[name]) for name in calm)
    assert all(calm[name].abs().max() > 0 for name in calm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_partitioned_weights_and_buffers_are_those_of_a_model_loaded_whole(
    tmp_path: Path, device: str, dtype: torch.dtype
) -> None:
    factories.tiny_decoder(tmp_path / "base")
    _check_partitioned(tmp_path, device, dtype, "causal_lm")


def test_weights_that_files_join_are_partitioned_under_the_names_of_modules(tmp_path: Path) -> None:
    families.pretrained(tmp_path / "base", families.FAMILIES["nomic-bert"])
    _check_partitioned(tmp_path, "cpu", torch.float32, "masked_lm")


def _check_partitioned(tmp_path: Path, device: str, dtype: torch.dtype, objective: str) -> None:
    in_a_process(load_whole_and_partitioned, tmp_path, device, dtype, objective)
    whole, partitioned = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "partitioned.pt")
    assert whole.keys() == partitioned.keys() and any("inv_freq" in name for name in whole)
    for name, tensor in whole.items():
        assert partitioned[name].dtype == tensor.dtype, name
        assert torch.equal(partitioned[name], tensor), name


def test_runs_of_several_seeds_share_no_dropout(tmp_path: Path) -> None:
    in_a_process(record_seeds, tmp_path)
    by_seed = [torch.load(tmp_path / f"seeds-{seed}.pt") for seed in range(3)]
    assert [len(set(each)) for each in by_seed] == [8, 8, 8], "four steps of two micro-batches"
    assert len({each for seeds in by_seed for each in seeds}) == 24


def record_seeds(folder: Path) -> None:
    """Run four steps with each of three seeds; write down torch's seed in each micro-batch."""
    join(folder, "cpu")
    for seed in range(3):
        engine = new_engine("cpu", 0, seed=seed)
        objective = RecordsSeeds(engine)
        run_steps(
            engine,
            objective,
            Optimization(**{**OPTIMIZATION, "seed": seed}, zero_stage=0, checkpoint_every_s=9),
            checkpoints=Location(str(folder / f"checkpoints-{seed}")),
            reporter=MagicMock(),
            flops_per_token=1.0,
            doc_ids_of=lambda numbers: [str(each) for each in numbers],
        )
        torch.save(objective.seeds, folder / f"seeds-{seed}.pt")
    torch.distributed.destroy_process_group()


class RecordsSeeds:
    """Four steps of two micro-batches."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.data_order = DataOrder(num_units=4, batch_size=1, num_epochs=1, seed=0)
        self.seeds: list[int] = []
        self._model = engine.model

    def batches(self, first_step: int) -> Iterator[int]:
        return iter(range(first_step, 4))

    def work(self, engine: DeepSpeedEngine, batch: int, step: int) -> StepWork[Tensor]:
        inputs = torch.ones(8, 24)
        return StepWork(
            parts=[(inputs, 0.5)] * 2,
            loss_of=self._loss,
            num_tokens=8,
            num_slots=8,
            num_passages=1,
            first_passages=[batch],
        )

    def _loss(self, inputs: Tensor) -> Tensor:
        self.seeds.append(torch.initial_seed())
        return self._model(inputs).square().mean()


def load_whole_and_partitioned(folder: Path, device: str, dtype: torch.dtype, objective: Any) -> None:
    join(folder, device)
    source = open_model(str(folder / "base"))
    for name, zero_stage in (("whole", 0), ("partitioned", 3)):
        model = load_for_training(
            source, objective=objective, dtype=dtype, device=torch.device(device), zero_stage=zero_stage
        )
        parameters = dict(model.named_parameters())
        with gathered(list(parameters.values())):
            state = {each: tensor.detach().cpu().clone() for each, tensor in parameters.items()}
        state |= {each: tensor.cpu() for each, tensor in model.named_buffers()}
        torch.save(state, folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


def in_a_process(work: Callable[..., None], *given: Any) -> None:
    process = CONTEXT.Process(target=work, args=given)
    process.start()
    process.join(timeout=600)
    assert process.exitcode == 0


def join(folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": device}
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)


def step_twice_and_once(folder: Path, device: str, zero_stage: int, base_dtype: Any) -> None:
    """Two steps of one engine; one step, and the next of another engine that took over its state."""
    join(folder, device)
    inputs = torch.randn(4, 8, 24, generator=torch.Generator().manual_seed(1)).to(device)

    def taken(engine: DeepSpeedEngine, steps: list[int]) -> dict[str, Any]:
        for step in steps:
            engine.step([(inputs[step], 1.0)], loss_of=lambda x: engine.model(x).square().mean(), rate=1.0, step=step)
        return engine.state()

    first = taken(new_engine(device, zero_stage, base_dtype=base_dtype), [0])
    torch.save(taken(new_engine(device, zero_stage, base_dtype=base_dtype), [0, 1]), folder / "calm.pt")
    other = new_engine(device, zero_stage, base_dtype=base_dtype)
    other.load_state(first, step=1)
    torch.save(taken(other, [1]), folder / "resumed.pt")
    torch.distributed.destroy_process_group()


def new_engine(device: str, zero_stage: int, *, seed: int = 0, base_dtype: Any = "auto") -> DeepSpeedEngine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16))
    quantize(model, base_dtype, torch.device(device))
    dora.add_adapters(model, dora.AdapterShape(method="dora", rank=4, alpha=8.0, dropout=0.1, targets=("0",)))
    optimization: Any = {**OPTIMIZATION, "seed": seed}
    return DeepSpeedEngine(model.to(device), Optimization(**optimization, zero_stage=zero_stage, checkpoint_every_s=9))
