"""What models cost: parameters, arithmetic and bytes, counted against torch."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from readapt_ray.catalog import shapes
from readapt_ray.catalog.shapes import measure_shape, model_shape, pretrained_shape
from readapt_ray.nn import quantized
from readapt_ray.planner import cluster_files, machines, worker_memory
from readapt_ray.stages.train import TrainConfig
from readapt_ray.training import dora, memory
from readapt_ray.training.dora import AdapterShape
from readapt_ray.training.memory import num_trained
from tests import factories
from tests.planner.plans import PRICES, make_plan, write


@pytest.mark.parametrize(
    ("name", "billions"),
    [  # what their model cards say, without the language-model head
        ("mistralai/Mistral-7B-v0.1", 7.24 - 0.13),
        ("repllama", 6.74 - 0.13),
        ("qwen3-embedding-0.6b", 0.596),
        ("qwen3-embedding-8b", 7.57),
        ("m3e-base", 0.102),
        ("all-minilm-l6-v2", 0.0227),
    ],
)
def test_catalog_models_have_the_parameters_that_their_cards_say(name: str, billions: float) -> None:
    assert model_shape(name).num_parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_flops_are_those_that_torch_counts(tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    folder = factories.tiny_decoder(tmp_path / "model", hidden_size=64)
    shape = model_shape(str(folder), "causal_lm")
    model = AutoModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros((1, 48), dtype=torch.long))
    forward = dataclasses.replace(shape, is_causal=False).forward_flops(
        48
    )  # eager attention computes what causality hides
    assert 48 * forward == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_parameters_of_a_dora_adapter_are_those_that_are_trained(tmp_path: Path) -> None:
    base = factories.tiny_decoder(tmp_path / "base")
    folder = factories.dora_adapter(tmp_path / "adapter", base)
    config = json.loads((folder / "adapter_config.json").read_text())
    adapter = AdapterShape(
        method="dora", rank=config["r"], alpha=1.0, dropout=0.0, targets=tuple(config["target_modules"])
    )
    tensors = factories.load_file(folder / "adapter_model.safetensors")
    expected = num_trained(model_shape(str(base)), adapter)
    assert expected == sum(each.numel() for each in tensors.values())


QWEN = "Qwen/Qwen3-0.6B-Base"


TRAININGS: list[dict[str, Any]] = [
    {},
    {"torch_compile": True},
    {"gradient_checkpointing": True},
    {"torch_compile": True, "gradient_checkpointing": True, "micro_batch_tokens": 512, "block_tokens": 2048},
    {"dtype": "float32", "zero_stage": 3, "num_workers": 4},
    {"method": "lora", "zero_stage": 2, "num_workers": 3, "target_modules": ("q_proj",)},
    {"method": "full", "zero_stage": 1, "num_workers": 2},
    {"base_dtype": "int8", "zero_stage": 2, "num_workers": 2},
    {"base_dtype": "nf4", "gradient_checkpointing": True},
]


def trained_module(name: str, objective: Any, adapter: AdapterShape | None, base_dtype: Any = "auto") -> Any:
    """The model that train makes, without weights."""
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**shapes._config(name))
        model = shapes.auto_class(objective).from_config(config)
        if adapter is None:
            return model.requires_grad_(True)
        quantized.quantize(model, base_dtype, torch.device("meta"))
        dora.add_adapters(model, adapter)
    return model


@pytest.mark.parametrize("gpus", [0, 8])
@pytest.mark.parametrize("options", TRAININGS, ids=lambda options: "-".join(options) or "defaults")
def test_a_plan_and_the_check_before_training_count_the_same_bytes(options: dict[str, Any], gpus: int) -> None:
    shape = pretrained_shape(QWEN)
    group = {"name": "x", "cpus": 64, "memory_gb": 512, "gpu": "H100", "gpus": gpus}
    cluster = machines.Cluster(name="x", groups=cluster_files._plain({"nodes": [group]}, PRICES, "here"))
    config = TrainConfig(pretrained=QWEN, corpus="c", output="o", **options)
    num_workers = options.get("num_workers", 1)
    planned = worker_memory.train_memory(config, shape, cluster, num_workers).parts
    adapter = worker_memory.train_adapter(config, shape)
    is_low = cluster.computes_low(config.dtype)
    demand = memory.WorkerSetup(
        adapter=adapter,
        num_workers=num_workers,
        zero_stage=config.zero_stage,
        micro_batch_tokens=max(config.micro_batch_tokens, config.block_tokens),
        dtype=torch.bfloat16 if is_low else torch.float32,
        gradient_checkpointing=config.gradient_checkpointing,
        device_type="cuda" if gpus else "cpu",
        base_dtype=config.base_dtype,
    )
    assert planned == memory.estimate_memory(shape, demand).parts
    model = trained_module(QWEN, "causal_lm", adapter, config.base_dtype)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    frozen = sum(each.numel() for each in model.parameters() if not each.requires_grad)
    stage = config.zero_stage
    assert planned["trained weights"] == 4 * trained // (num_workers if stage >= 3 else 1)
    layers = [each for each in model.modules() if isinstance(each, quantized.QuantizedLinear)]
    assert bool(layers) == (config.base_dtype != "auto")
    stored = sum(each.nbytes for layer in layers for each in layer.buffers())
    decoded = max((layer.in_features * layer.out_features for layer in layers), default=0)
    width = 2 if is_low else 4
    assert planned["frozen weights"] == ((frozen + decoded) * width + stored) // (num_workers if stage >= 3 else 1)


@pytest.mark.parametrize(
    ("gigabytes", "said"),
    [
        (24, "set train.gradient_checkpointing true, which needs 19.06 GB"),
        (16, "set train.base_dtype int8 and train.gradient_checkpointing true, which needs 12.21 GB"),
        (12, "set train.base_dtype nf4 and train.gradient_checkpointing true, which needs 9.15 GB"),
        (8, "set train.gradient_checkpointing, raise"),
    ],
)
def test_a_plan_says_with_which_base_dtype_a_7b_model_fits_on_a_gpu(gigabytes: int, said: str) -> None:
    shape = pretrained_shape("mistralai/Mistral-7B-v0.1")
    gpu = machines.NodeGroup(
        name="g", count=1, cpus=8, memory_bytes=2e11, gpu="L4", gpus=1, gpu_flops=1e14, gpu_memory_bytes=gigabytes * 1e9
    )
    cluster = machines.Cluster(name="c", groups=(gpu,))
    config = TrainConfig(pretrained="m", corpus="c", output="o")
    found = worker_memory.train_memory(config, shape, cluster, 1)
    assert not found.fits
    assert said in found.advice
    if gigabytes > 8:
        chosen = {"base_dtype": {24: "auto", 16: "int8", 12: "nf4"}[gigabytes], "gradient_checkpointing": True}
        config = TrainConfig(pretrained="m", corpus="c", output="o", **chosen)
        assert worker_memory.train_memory(config, shape, cluster, 1).fits


@pytest.mark.parametrize("name", [QWEN, "Qwen/Qwen3-8B-Base", "nreimers/MiniLM-L6-H384-uncased"])
def test_tied_and_masked_heads_are_counted_once(name: str) -> None:
    shape = pretrained_shape(name)
    model = trained_module(name, "masked_lm" if "MiniLM" in name else "causal_lm", None)
    assert shape.num_parameters == sum(each.numel() for each in model.parameters())
    assert shape == measure_shape(model, name)


def test_a_run_that_is_told_to_start_anyway_is_no_problem(run_file: Path) -> None:
    cluster = write(run_file, {"nodes": [{"name": "head", "cpus": 2, "memory_gb": 1}]}, "small.yaml")
    sections = {"train": {"block_tokens": 64, "check_memory": False}}
    assert [each for each in make_plan(run_file, sections, cluster=cluster).problems if "adapter" in each] == []
    assert any("adapter" in each for each in make_plan(run_file, cluster=cluster).problems)
