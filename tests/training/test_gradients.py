"""Gradients are summed over workers beside the backward pass: by us at ZeRO stage 0, by DeepSpeed at the others."""

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from readapt_ray.training import dora, gradients
from readapt_ray.training.engine import DeepSpeedEngine, Optimization, deepspeed_config

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.attempt"])
NUM_LAYERS, WIDTH, RANK, NUM_PARTS, NUM_STEPS = 4, 24, 4, 4, 3
OPTIMIZATION = Optimization(
    learning_rate=1e-2,
    weight_decay=0.1,
    warmup_fraction=0.0,
    max_gradient_norm=0.5,
    zero_stage=0,
    seed=0,
    checkpoint_every_s=9,
)


@pytest.mark.parametrize(
    ("zero_stage", "method", "num_workers"),
    [
        *((0, "dora", num) for num in (1, 2)),
        *((stage, "dora", 2) for stage in (2, 3)),
        (3, "dora", 1),
        *((stage, "full", 2) for stage in (0, 2)),
        pytest.param(1, "dora", 2, marks=pytest.mark.slow),
        pytest.param(3, "full", 2, marks=pytest.mark.slow),
    ],
)
def test_workers_take_the_steps_of_plain_torch(tmp_path: Path, zero_stage: int, method: str, num_workers: int) -> None:
    """Several passes per step and worker, in buckets of an adapter's layer, into which a weight of a full model does not fit."""
    wanted, found = plain_steps(method), trained(tmp_path, num_workers, zero_stage, method)
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-4)
    assert len(set(wanted["losses"])) == NUM_STEPS
    for name, value in wanted["state"].items():
        assert torch.allclose(found["state"][name], value, rtol=1e-3, atol=1e-5), name


def test_buckets_leave_before_the_backward_pass_ends(tmp_path: Path) -> None:
    """In the last pass of a step, the sum of a layer's gradients is begun when they are there."""
    events = trained(tmp_path, 2, 0, "dora")["events"]
    layers = [f"layer {number}" for number in reversed(range(NUM_LAYERS))]
    assert events == [*layers, *(event for layer in layers for event in (layer, "sum"))] * NUM_STEPS


def test_what_no_loss_reaches_is_summed_at_the_end(tmp_path: Path) -> None:
    """Every worker sends every bucket, or the others would wait for ever."""
    assert trained(tmp_path, 2, 0, "unreached")["losses"] == pytest.approx(plain_steps("unreached")["losses"], rel=1e-5)


def test_deepspeed_has_no_buffer_that_is_larger_than_its_gradients() -> None:
    """Its default of 5e8 numbers is 2 GB of each GPU, and one bucket for a whole adapter, which nothing is beside."""
    for stage in (1, 2, 3):
        zero = deepspeed_config(zero_stage=stage, max_gradient_norm=1.0)["zero_optimization"]
        assert zero == {"stage": stage, "overlap_comm": True, "reduce_bucket_size": (25 << 20) // 4}


def plain_steps(method: str) -> dict[str, Any]:
    """The same without DeepSpeed, in one process."""
    model = new_model(method)
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=OPTIMIZATION.learning_rate, weight_decay=OPTIMIZATION.weight_decay)
    losses, norms = [], []
    for parts in inputs():
        loss = sum(model(part).square().mean() for part in parts) / NUM_PARTS
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(named.values(), OPTIMIZATION.max_gradient_norm)))
        optimizer.step()
        optimizer.zero_grad()
        dora.refresh(model)
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms, "state": {name: each.detach() for name, each in named.items()}}


def inputs() -> Tensor:
    return torch.randn(NUM_STEPS, NUM_PARTS, 8, WIDTH, generator=torch.Generator().manual_seed(1))


def trained(folder: Path, num_workers: int, zero_stage: int, method: str) -> dict[str, Any]:
    """What worker 0 of so many says after some steps."""
    given = (folder, num_workers, zero_stage, method)
    workers = [CONTEXT.Process(target=worker, args=(rank, *given)) for rank in range(num_workers)]
    for each in workers:
        each.start()
    for each in workers:
        each.join(timeout=600)
    assert [each.exitcode for each in workers] == [0] * num_workers
    found: dict[str, Any] = torch.load(folder / "found.pt")
    return found


def worker(rank: int, folder: Path, num_workers: int, zero_stage: int, method: str) -> None:
    """Take the steps on this worker's share of the micro-batches."""
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_workers)
    gradients.BUCKET_BYTES = 4 * (RANK * (WIDTH + WIDTH) + WIDTH)
    model = new_model(method)
    events: list[str] = []
    watch(model, events)
    engine = DeepSpeedEngine(model, replace(OPTIMIZATION, zero_stage=zero_stage))
    outcomes = [
        engine.step(
            [(part, 1.0) for part in parts[rank::num_workers]],
            loss_of=lambda part: engine.model(part).square().mean() / NUM_PARTS,
            rate=1.0,
            step=number,
        )
        for number, parts in enumerate(inputs())
    ]
    state = engine.state()
    if rank == 0:
        found = {"losses": [each.loss for each in outcomes], "norms": [each.gradient_norm for each in outcomes]}
        torch.save({**found, "state": state, "events": events}, folder / "found.pt")
    torch.distributed.destroy_process_group()


def new_model(method: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)))
    if method == "full":
        return model
    if method == "unreached":
        model.register_module("aside", nn.Linear(WIDTH, WIDTH))
        model.forward = lambda x: x + sum(each.weight.sum() for each in model[:2])  # type: ignore[assignment]
        return model
    dora.add_adapters(model, dora.AdapterShape(method="dora", rank=RANK, alpha=8.0, dropout=0.0, targets=tuple("0123")))
    with torch.no_grad():
        for _, each in dora.adapted_layers(model):
            each.lora_B.normal_()
    dora.refresh(model)
    return model


def watch(model: nn.Module, events: list[str]) -> None:
    """Note when the last gradient of an adapted layer is there, and when a sum of gradients is begun."""
    for name, layer in dora.adapted_layers(model):
        arrived: list[Any] = []

        def arrive(_: Tensor, name: str = name, arrived: list[Any] = arrived) -> None:
            arrived.append(1)
            if len(arrived) % 3 == 0:
                events.append(f"layer {name}")

        for parameter in (layer.lora_A, layer.lora_B, layer.magnitude):
            assert parameter is not None
            parameter.register_post_accumulate_grad_hook(arrive)
    all_reduce = torch.distributed.all_reduce

    def watched(tensor: Tensor, **given: Any) -> Any:
        if given.get("async_op"):
            events.append("sum")
        return all_reduce(tensor, **given)

    gradients.torch.distributed.all_reduce = watched  # type: ignore[assignment]
