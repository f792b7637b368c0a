"""What models cost: parameters, arithmetic and bytes, counted against torch."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from readapt_ray.catalog import shapes
from readapt_ray.catalog.models import open_model
from readapt_ray.catalog.shapes import measure_shape, model_shape, pretrained_shape
from readapt_ray.nn import quantized
from readapt_ray.planner import cluster_files, machines, worker_memory
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.stages.embed import EmbedConfig
from readapt_ray.stages.train import TrainConfig
from readapt_ray.training import dora, memory
from readapt_ray.training.dora import AdapterShape
from readapt_ray.training.memory import num_trained
from tests import factories
from tests.planner.plans import PRICES, REPOSITORY, make_plan, write
from tests.retrieval.devices import OnCuda


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
    is_16_bit = cluster.computes_in_16_bits(config.dtype)
    demand = memory.WorkerSetup(
        adapter=adapter,
        num_workers=num_workers,
        zero_stage=config.zero_stage,
        micro_batch_tokens=max(config.micro_batch_tokens, config.block_tokens),
        dtype=torch.bfloat16 if is_16_bit else torch.float32,
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
    width = 2 if is_16_bit else 4
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


def test_the_gigabytes_that_the_page_of_jobs_shows_are_those_of_the_plan() -> None:
    shape = pretrained_shape("mistralai/Mistral-7B-v0.1")
    needed = {}
    for base_dtype in ("none", "auto", "int8", "fp8", "nf4"):
        options = {} if base_dtype == "none" else {"base_dtype": base_dtype, "gradient_checkpointing": True}
        config = TrainConfig(pretrained="m", corpus="c", output="o", **options)
        assert config.micro_batch_tokens == 4096
        needed[base_dtype] = worker_memory.train_memory(config, shape, gpu_cluster(80e9), 1).needed / 1e9
    text = " ".join((REPOSITORY / "jobs" / "README.md").read_text().split())
    assert f"with 4,096 tokens per pass needs {needed['none']:.0f} GB." in text
    assert f"With `--gradient-checkpointing` it needs {needed['auto']:.1f} GB;" in text
    for base_dtype in ("int8", "fp8"):
        assert f"with `--base-dtype int8` or `fp8` in addition {needed[base_dtype]:.1f} GB," in text
    assert f"or with nf4 {needed['nf4']:.1f} GB." in text


def gpu_cluster(gpu_memory_bytes: float) -> machines.Cluster:
    group = machines.NodeGroup(
        name="g",
        count=1,
        cpus=64,
        memory_bytes=2e11,
        gpu="L4",
        gpus=1,
        gpu_flops=1e14,
        gpu_memory_bytes=gpu_memory_bytes,
    )
    return machines.Cluster(name="c", groups=(group,))


@pytest.mark.parametrize(
    ("name", "gigabytes", "options", "part"),
    [  # MiniLM: two encoders have half of the GPU each; a token of a 7B is 151,552 bytes
        ("all-minilm-l6-v2", 24, {}, ("a batch of 119,808 tokens", 119_808 * 15_360)),
        ("all-minilm-l6-v2", 4, {}, ("a batch of 24,576 tokens", 24_576 * 15_360)),
        ("all-minilm-l6-v2", 4, {"num_gpus_per_worker": 1.0}, ("a batch of 84,992 tokens", 84_992 * 15_360)),
        ("all-minilm-l6-v2", 24, {"dtype": "float32"}, ("a batch of 16,384 tokens", 16_384 * 30_720)),
        ("e5-mistral", 80, {}, ("a batch of 9,216 tokens", 9216 * 151_552)),
        ("e5-mistral", 17, {}, ("a batch of 2,048 tokens", 2048 * 151_552)),
        ("e5-mistral", 17, {"batch_tokens": 777}, ("a batch of 777 tokens", 777 * 151_552)),
    ],
)
def test_a_plan_says_how_many_tokens_an_encoders_batch_will_have(
    name: str, gigabytes: int, options: dict[str, Any], part: tuple[str, int]
) -> None:
    config = EmbedConfig(retriever="m", corpus="c", output="o", **options)
    found = worker_memory.embed_memory(config, model_shape(name), gpu_cluster(gigabytes * 1e9))
    assert found.fits and list(found.parts.items())[1] == part
    assert ("embed.batch_tokens" in found.advice) == ("batch_tokens" in options)
    is_shared = name == "all-minilm-l6-v2" and "num_gpus_per_worker" not in options
    assert ("embed.num_gpus_per_worker" in found.advice) == is_shared


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gpu_share", [1.0, 0.5])
def test_a_plan_and_the_encoder_choose_the_same_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, gpu_share: float
) -> None:
    folder = factories.tiny_encoder(tmp_path / "model", headless=True)
    factories.write_contract(folder)
    model = open_model(str(folder))
    config = EmbedConfig(retriever="m", corpus="c", output="o", dtype=dtype, num_gpus_per_worker=gpu_share)  # type: ignore[arg-type]
    seen = set()
    for share_gb in (1.0, 1.145, 1.15, 1.16, 1.17, 80):  # 1.142 GB are the process
        gigabytes = share_gb / gpu_share
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _, total=gigabytes: (int(total * 1e9), int(total * 1e9)))
        network = Encoder.load(model, dtype=dtype, device="cpu").network
        encoder = OnCuda(
            network, model.tokenizer, model.encoding, identify=str, packed=dtype == "bfloat16", gpu_share=gpu_share
        )
        planned = worker_memory.embed_memory(config, model_shape(str(folder)), gpu_cluster(gigabytes * 1e9))
        assert f"a batch of {encoder.batch_tokens:,} tokens" in planned.parts
        seen.add(encoder.batch_tokens)
    assert len(seen) > 2


@pytest.mark.parametrize(
    ("name", "options", "dtypes", "packed_bytes"),
    [
        ("all-minilm-l6-v2", {"dtype": "float32"}, {"float32"}, 4 * (6 * 12 + 1) * 384**2),
        ("all-minilm-l6-v2", {"dtype": "bfloat16"}, {"float32", "bfloat16"}, 2 * (6 * 12 + 1) * 384**2),
        ("all-minilm-l6-v2", {"dtype": "float16"}, {"float32", "bfloat16"}, None),
        ("all-minilm-l6-v2", {"dtype": "float32"}, {"bfloat16"}, None),
        ("all-minilm-l6-v2", {}, {"float32"}, 4 * (6 * 12 + 1) * 384**2),
        ("e5-mistral", {"dtype": "bfloat16"}, {"bfloat16"}, None),  # more than 2 GiB are not packed
    ],
)
def test_weights_that_cpus_pack_are_counted_twice(
    name: str, options: dict[str, Any], dtypes: set[str], packed_bytes: int | None
) -> None:
    group = machines.NodeGroup(name="n", count=1, cpus=4, memory_bytes=2e11, packed_dtypes=frozenset(dtypes))
    config = EmbedConfig(retriever="m", corpus="c", output="o", **options)
    cluster = machines.Cluster(name="c", groups=(group,))
    found = worker_memory.embed_memory(config, model_shape(name), cluster)
    assert found.parts.get("packed copy of the weights") == packed_bytes
    assert "a batch of 1,024 tokens" in found.parts
    on_gpus = worker_memory.embed_memory(config, model_shape(name), gpu_cluster(8e10))
    assert "packed copy of the weights" not in on_gpus.parts


@pytest.mark.parametrize(("is_amd", "dtypes"), [(True, {"float32", "bfloat16"}), (False, {"bfloat16"})])
def test_what_is_packed_is_known_of_this_machine_alone(
    monkeypatch: pytest.MonkeyPatch, is_amd: bool, dtypes: set[str]
) -> None:
    monkeypatch.setattr("readapt_ray.hardware.is_amd", lambda: is_amd)
    monkeypatch.setattr("readapt_ray.hardware.has_bfloat16_units", lambda: True)
    assert cluster_files.read_cluster("local", PRICES).groups[0].packed_dtypes == dtypes
    unknown = cluster_files._plain({"nodes": [{"name": "x", "cpus": 64, "memory_gb": 512}]}, PRICES, "here")
    assert unknown[0].packed_dtypes == {"float32", "bfloat16"}


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
