"""How many tokens a batch has, and what it holds in memory. No GPU is needed: devices are imitated, bytes are counted."""

import dataclasses
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel
from transformers.initialization import no_init_weights

from benchmarks.step_traffic import PASSAGE_TOKENS, SHAPES, Count, as_on_cuda
from readapt_ray.catalog.models import open_model
from readapt_ray.catalog.shapes import measure_shape, model_shape
from readapt_ray.errors import InputError
from readapt_ray.nn import attention, norms
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.encoder_sizes import (
    activation_bytes,
    encoders_per_gpu,
    free_for_batches,
    gpu_batch_tokens,
    wanted_gpu_tokens,
)
from readapt_ray.retrieval.forward_pass import packed_inputs
from tests import factories
from tests.retrieval.devices import OnCuda

GB = 10**9
NAMES = ("all-minilm-l6-v2", "bge-base-zh", "e5-mistral")


@pytest.mark.parametrize(("name", "expected"), zip(NAMES, [(119_808,) * 3, (45_056,) * 3, (9216,) * 3], strict=True))
def test_a_batch_is_as_large_as_the_model_is_small(name: str, expected: tuple[int, ...]) -> None:
    """By hand at 450 TFLOP/s, in bfloat16, with 8, 24 and 80 GB free.

    all-MiniLM-L6-v2: 6 layers start in 1.5 ms, and four times that is 118,900 of its tokens (22.7 MFLOP each). bge-base: eight
    rounds of 132 tiles of 128 x 256 are 45,056 tokens of 768 numbers. Mistral-7B: the same with 4,096 numbers is 8,448.
    """
    found = tuple(gpu_batch_tokens(model_shape(name), free * GB, width=2) for free in (8, 24, 80))
    assert found == expected


@pytest.mark.parametrize(
    ("name", "free", "width", "expected"),
    [
        # half of 1 GB by 2 bytes x (8 x 384 + 12 x 384)
        ("all-minilm-l6-v2", 1, 2, 500_000_000 // 15_360 // 1024 * 1024),
        ("bge-base-zh", 1, 2, 500_000_000 // (2 * 20 * 768) // 1024 * 1024),
        # of 2 GB by 2 bytes x (8 x 4,096 + 3 x 14,336)
        ("e5-mistral", 2, 2, 1_000_000_000 // 151_552 // 1024 * 1024),
        ("e5-mistral", 2, 4, 3072),
        ("e5-mistral", 0.1, 2, 1024),  # not even these fit: memory that runs out halves them
        ("e5-mistral", 0, 2, 1024),
    ],
)
def test_half_of_the_free_memory_bounds_a_batch(name: str, free: float, width: int, expected: int) -> None:
    assert gpu_batch_tokens(model_shape(name), free * GB, width=width) == expected


def test_float32_needs_fewer_and_padding_gets_no_more_than_before() -> None:
    """In float32 a token takes eight times as long: tiles alone count, and 90,112 tokens of 384 numbers have eight rounds."""
    shape = model_shape("all-minilm-l6-v2")
    assert wanted_gpu_tokens(shape, width=4) == 90_112
    assert (
        wanted_gpu_tokens(shape, width=2, is_packed=False)
        == wanted_gpu_tokens(shape, width=4, is_packed=False)
        == 16_384
    )
    assert wanted_gpu_tokens(model_shape("e5-mistral"), width=2, is_packed=False) == 9216
    tiny = dataclasses.replace(shape, hidden=64, num_matrix_parameters=100_000, attention_width=64)
    assert wanted_gpu_tokens(tiny, width=2) == 131_072


def test_models_whose_batches_outlast_the_hosts_work_have_a_gpu_alone() -> None:
    """By hand: for 119,808 tokens of MiniLM the host takes 1.5 + 6.0 ms and the GPU 6.0; bge-base 3 + 2.3 ms and 17.6."""
    assert [encoders_per_gpu(model_shape(name)) for name in NAMES] == [2, 1, 1]
    shape = model_shape("all-minilm-l6-v2")
    quick = dataclasses.replace(shape, num_layers=3, num_matrix_parameters=shape.num_matrix_parameters // 4)
    assert encoders_per_gpu(quick) == 4


class _Peak(TorchDispatchMode):
    """Note the most bytes that tensors on the meta device take at once."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = {each.untyped_storage()._cdata for each in kept}
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and each.is_meta:
                storage = each.untyped_storage()
                if storage._cdata not in self.live.keys() | self.kept:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata)
        self.most = max(self.most, sum(self.live.values()))
        return out


ENCODERS: dict[str, dict[str, Any]] = {
    **SHAPES,
    "all-minilm-l6-v2": {"model_type": "bert", "hidden_size": 384, "intermediate_size": 1536},
    "bge-base": {"model_type": "bert"},
    "gemma-3": {"model_type": "gemma3_text"},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_forward_pass_holds_no_more_than_is_counted(name: str) -> None:
    """The peak of a packed pass on the meta device, of models of two layers; the bound is at most 1.9 times as high."""
    config = AutoConfig.for_model(**dict(ENCODERS[name], num_hidden_layers=2))
    with torch.device("meta"), no_init_weights():
        network = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    shape = measure_shape(network, name)
    norms.fuse(network)
    attention.install(network, name)
    rows = [np.ones(PASSAGE_TOKENS, np.int64)] * 20
    ids, positions, ends = (torch.from_numpy(each).to("meta") for each in packed_inputs(rows))
    given = {"input_ids": ids, "position_ids": positions, "cu_seq_lens_q": ends, "max_length_q": PASSAGE_TOKENS}
    peak = _Peak([*network.parameters(), *network.buffers(), ids, positions, ends])
    with torch.no_grad(), as_on_cuda(Count()), peak:
        network(**given, use_cache=False)
    held = peak.most / ids.numel()
    assert held <= activation_bytes(shape, 2) < 1.9 * held


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = factories.tiny_encoder(tmp_path_factory.mktemp("models") / "encoder", headless=True)
    factories.write_contract(folder)
    return open_model(str(folder))


@pytest.fixture
def load(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return an encoder of a GPU with so much memory, of which so much is free."""

    def loaded(total: float, free: float | None = None, **options: Any) -> OnCuda:
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (int(total if free is None else free), int(total)))
        network = Encoder.load(model, device="cpu").network
        return OnCuda(network, model.tokenizer, model.encoding, identify=str, **options)

    return loaded


def test_an_encoder_on_a_gpu_takes_the_tokens_that_its_free_memory_holds(
    load: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32; padded, as on GPUs without a kernel for this type, and packed."""
    padded = load(80 * GB)
    shape = measure_shape(padded.network, "")
    num_bytes = 4 * shape.num_parameters
    assert padded.batch_tokens == padded.first_batch_tokens == 16_384
    assert load(80 * GB, packed=True).batch_tokens == 131_072
    token = activation_bytes(shape, 4)
    usable = 2**30 + num_bytes + 2 * 5000 * token  # 1 GiB is the process
    assert load(usable / 0.94 + 1).batch_tokens == 4096
    assert load(80 * GB, free=2 * 5000 * token).batch_tokens == 4096, "others hold the rest"
    quarter = load(4 * usable / 0.94 + 4, gpu_share=0.25)
    assert quarter.batch_tokens == 4096, "the encoders that share the GPU may start later"
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (80 * GB, int(4 * usable / 0.94 + 4)))
    assert OnCuda.load(model, device="cpu", gpu_share=0.25).batch_tokens == 4096
    more = 2 * 2048 * token
    assert load(usable / 0.94 + 1, reserved_bytes=more).batch_tokens == 2048
    assert load(80 * GB, free=2 * 5000 * token, reserved_bytes=more).batch_tokens == 2048
    assert load(0.5 * GB, free=0).batch_tokens == 1024


def test_the_tokens_that_the_user_gives_are_taken_as_they_are(load: Any, model: Any) -> None:
    assert load(0, batch_tokens=77_777).batch_tokens == 77_777
    assert Encoder.load(model, device="cpu").batch_tokens == 1024
    with pytest.raises(InputError, match="batch_tokens = 0; it must be at least 1"):
        load(0, batch_tokens=0)


def test_on_a_gpu_memory_that_runs_out_halves_what_was_chosen(
    load: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [each.text for each in factories.small_corpus(30)]
    expected = Encoder.load(model, device="cpu").encode(texts, "passage")
    encoder = load(80 * GB, packed=True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    forward = encoder.network.forward

    def small(**given: Any) -> Any:
        if given["input_ids"].numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**given)

    encoder.network.forward = small
    np.testing.assert_allclose(encoder.encode(texts, "passage"), expected, atol=1e-5)
    assert encoder.batch_tokens <= 100 < encoder.first_batch_tokens == 131_072


def test_what_is_free_is_what_weights_and_process_leave() -> None:
    assert free_for_batches(10 * GB, 4 * GB) == 6 * GB - 2**30
    assert free_for_batches(1 * GB, 4 * GB) == 0
