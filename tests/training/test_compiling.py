"""Compiled layers are used only where they compute what the layers compute without a compiler."""

import logging
import re
from typing import Any

import numpy as np
import pytest
import torch

from readapt_ray.cluster.optimization import compiles
from readapt_ray.stages.train import TrainConfig
from readapt_ray.training import compiling, dora, objectives, packing
from readapt_ray.training.packing import Batch, Block
from tests import flash_kernel
from tests.training.test_objectives import decoder


@pytest.fixture(autouse=True)
def compiler_as_it_was() -> Any:
    torch.compiler.reset()
    with (
        torch._functorch.config.patch(activation_memory_budget=1.0),
        torch._dynamo.config.patch(suppress_errors=False),
    ):
        yield
    torch.compiler.reset()


def backend(change: Any = None) -> Any:
    """Return a backend that runs the graph, changes what it gives, or raises it."""

    def compiled(graph: Any, _: Any) -> Any:
        if isinstance(change, Exception):
            raise change
        return graph.forward if change is None else lambda *args: change(graph.forward(*args))

    return compiled


def made(monkeypatch: pytest.MonkeyPatch, change: Any = None) -> tuple[Any, Batch]:
    """Return a model whose layers compile by a backend, and a batch."""
    by = backend(change)

    def compile_by(module: Any, **_: Any) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend=by, dynamic=True)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_by)
    model = decoder("mistral").bfloat16().train()
    objectives.prepare(model, "mistral")
    shape = dora.AdapterShape(method="dora", rank=4, alpha=8.0, dropout=0.05, targets=("q_proj", "v_proj", "down_proj"))
    dora.add_adapters(model, shape)
    passages = [Block(np.arange(4, 4 + num, dtype=np.int32), (num,), (num,)) for num in (9, 14, 30)]
    return model, packing.collate(passages, pad_id=0)


def is_compiled(model: Any) -> list[bool]:
    return [layer._compiled_call_impl is not None for layer in compiling.layers_of(model)]


def test_layers_that_are_right_stay_compiled_and_the_model_is_as_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = made(monkeypatch)
    before = dora.adapter_state(model)
    compiling.compile_if_right(model)
    with flash_kernel.installed(monkeypatch):
        torch.manual_seed(0)
        objectives.loss_sum(model, batch).backward()  # type: ignore[no-untyped-call]
        drawn = torch.rand(1)
    assert all(is_compiled(model))
    assert not any(record.name == "readapt_ray" for record in caplog.records)
    after = dora.adapter_state(model)
    assert all(torch.equal(after[name], each) for name, each in before.items())
    for _, layer in dora.adapted_layers(model):
        assert layer.cast_b is not None
        assert not layer.cast_b.any()
    with flash_kernel.installed(monkeypatch):  # the check draws no random number of the step
        torch.manual_seed(0)
        objectives.loss_sum(model, batch).backward()  # type: ignore[no-untyped-call]
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda out: tuple(each * 1.2 for each in out), r"torch.compile gives a layer's output off by 0\.2"),
        (lambda out: tuple(each * float("nan") for each in out), r"torch.compile gives a layer's output off by nan"),
        (RuntimeError("no such kernel\nat line 7"), r"BackendCompilerFailed: .*RuntimeError: no such kernel"),
    ],
)
def test_layers_that_are_wrong_are_not_compiled(
    change: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, _ = made(monkeypatch)
    model, batch = made(monkeypatch, change)
    plain.load_state_dict(model.state_dict())
    compiling.compile_if_right(model)
    losses = []
    with flash_kernel.installed(monkeypatch), caplog.at_level(logging.WARNING, "readapt_ray"):
        for each in (model, plain):
            torch.manual_seed(0)
            losses.append(objectives.loss_sum(each, batch).item())
    assert not any(is_compiled(model))
    assert all(layer.cast_b is None for _, layer in dora.adapted_layers(model))
    assert losses[0] == losses[1]
    (message,) = caplog.messages
    assert re.fullmatch(rf"layers are not compiled: {reason}.*", message)


def test_a_model_that_does_not_call_its_layers_in_turn_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = made(monkeypatch)
    model.others = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(9))
    compiling.compile_if_right(model)
    with flash_kernel.installed(monkeypatch), caplog.at_level(logging.WARNING, "readapt_ray"):
        assert objectives.loss_sum(model, batch).isfinite()
    assert caplog.messages == ["layers are not compiled: IndexError: list index out of range"]


def test_a_pass_without_gradients_is_not_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made(monkeypatch)
    compiling.compile_if_right(model)
    with flash_kernel.installed(monkeypatch):
        with torch.no_grad():
            objectives.loss_sum(model, batch)
        assert not any(is_compiled(model))
        objectives.loss_sum(model, batch)
        assert all(is_compiled(model))


@pytest.mark.parametrize(
    ("wanted", "device", "zero_stage", "compiled"),
    [
        (None, "cuda", 2, True),
        (None, "cuda", 3, False),
        (None, "cpu", 0, False),
        (True, "cpu", 0, True),
        (False, "cuda", 0, False),
    ],
)
def test_layers_are_compiled_on_gpus_unless_zero_partitions_them(
    wanted: bool | None, device: str, zero_stage: Any, compiled: bool
) -> None:
    config = TrainConfig(pretrained="m", corpus="c", output="o", torch_compile=wanted, zero_stage=zero_stage)
    assert compiles(config, device) == compiled
