"""Losses of passages in one row against transformers' own model, loss and attention, a passage at a time."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from readapt_ray.errors import ModelError
from readapt_ray.nn import attention
from readapt_ray.training import adapted_output, dora, objectives, packing
from readapt_ray.training.compiling import layers_of
from readapt_ray.training.packing import IGNORED, Block, Masking
from readapt_ray.training.trainable import reduce_memory
from tests import factories, flash_kernel

VOCAB = 150
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"sliding_window": 5, "head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
}
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


def decoder(family: str, **options: Any) -> Any:
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        **{"pad_token_id": 0, **DECODERS[family], **options},
    )
    return random_weights(AutoModelForCausalLM.from_config(config))


def encoder(family: str) -> Any:
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return random_weights(AutoModelForMaskedLM.from_config(config))


def random_weights(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.1)
    return model.float().train()


def some_passages(num: int = 7) -> list[Block]:
    random = np.random.default_rng(0)
    return [
        Block(random.integers(5, VOCAB, length).astype(np.int32), (int(length),), (number,))
        for number, length in enumerate(random.integers(3, 20, num))
    ]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


def one_at_a_time(model: Any, rows: list[tuple[Any, Any]]) -> float:
    """The sum of transformers' own logits' cross entropy over (input, labels), in the model's gradients too."""
    total = 0.0
    for ids, labels in rows:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=IGNORED, reduction="sum")
        loss.backward()
        total += loss.item()
    return total


def assert_alike(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, each in ours.items():
        scale = float(theirs[name].abs().max())
        assert torch.allclose(each, theirs[name], rtol=1e-4, atol=1e-5 * max(1.0, scale)), name


@pytest.fixture(params=["by passage", "by kernel"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways of attention; the kernel itself needs CUDA, here a stand-in is behind its operator."""
    with flash_kernel.installed(monkeypatch) if request.param == "by kernel" else contextlib.nullcontext():
        yield str(request.param)


@pytest.mark.parametrize("family", DECODERS)
def test_next_tokens_of_passages_in_a_row(family: str, path: str) -> None:
    model = decoder(family)
    passages = some_passages()
    rows = []
    for each in passages:
        ids = torch.from_numpy(each.input_ids.astype(np.int64))[None]
        rows.append((ids, torch.cat([ids[:, 1:], torch.full((1, 1), IGNORED)], dim=1)))
    expected = one_at_a_time(model, rows)
    expected_gradients = gradients(model)
    objectives.prepare(model, family)
    loss = objectives.loss_sum(model, packing.collate(passages, pad_id=0))
    loss.backward()  # type: ignore[no-untyped-call]
    num_labels = sum(each.num_labels() for each in passages)
    assert loss.item() / num_labels == pytest.approx(expected / num_labels, abs=1e-5)
    assert_alike(gradients(model), expected_gradients)


@pytest.mark.filterwarnings("error:Dynamo detected a call to")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_have_graphs_for_all_lengths_and_no_breaks(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the kernel, bfloat16, and dropout by torch."""
    model = decoder("mistral").bfloat16()
    objectives.prepare(model, "mistral")
    shape = dora.AdapterShape(method="dora", rank=4, alpha=8.0, dropout=0.05, targets=("q_proj", "v_proj", "down_proj"))
    dora.add_adapters(model, shape)
    random_weights_of_adapters(model)
    drop = torch.nn.functional.dropout  # the same draws for both
    monkeypatch.setattr(adapted_output, "draw_seed", lambda: 0)
    monkeypatch.setattr(adapted_output, "keep_mask", lambda x, share, _: drop(torch.ones_like(x), share).ne(0).to(x))
    batches = [packing.collate(some_passages(num), pad_id=0) for num in (7, 12, 4)]
    num_graphs = []
    compiled = CompileCounterWithBackend("aot_eager")

    initial = dora.adapter_state(model)

    def taken() -> list[tuple[float, dict[str, torch.Tensor]]]:
        """Losses and gradients; the factors change in between."""
        dora.load_adapter_state(model, initial, name="initial")
        found = []
        for batch in batches:
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16):
                loss = objectives.loss_sum(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            found.append((loss.item(), gradients(model)))
            num_graphs.append(compiled.frame_count)
            change_factors(model)
        return found

    budget = torch._functorch.config.patch(activation_memory_budget=1.0)  # as it was, afterwards
    with flash_kernel.installed(monkeypatch), budget:
        expected = taken()
        torch.compiler.reset()
        monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile_by, compiled))
        reduce_memory(model, gradient_checkpointing=recompute, compile_layers=True, zero_stage=0)
        ours = taken()
    assert all(layer._compiled_call_impl is not None for layer in layers_of(model))
    assert num_graphs[-1] == num_graphs[-3] <= 3  # the first layer's input needs no gradient, that of the others does
    assert not torch._dynamo.utils.counters["graph_break"]
    for (loss, grads), (expected_loss, expected_grads) in zip(ours, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-2)
        for name, each in expected_grads.items():
            assert (grads[name] - each).norm() < 0.05 * each.norm(), name


def change_factors(model: Any) -> None:
    with torch.no_grad():
        for _, layer in dora.adapted_layers(model):
            layer.lora_A.mul_(0.5)
            layer.lora_B.mul_(3)
    dora.refresh(model)


def compile_by(module: torch.nn.Module, backend: Any, **options: Any) -> None:
    """`Module.compile` with another backend."""
    module._compiled_call_impl = torch.compile(module._call_impl, backend=backend, **options)


def random_weights_of_adapters(model: Any) -> None:
    with torch.no_grad():
        for _, layer in dora.adapted_layers(model):
            layer.lora_B.normal_(std=0.1)
    dora.refresh(model)


@pytest.mark.parametrize("family", ENCODERS)
def test_masked_tokens_of_passages_in_a_row(family: str, path: str) -> None:
    model = encoder(family)
    passages = some_passages()
    masking = Masking(mask_id=4, vocab_size=VOCAB, seed=1, share=0.4)
    batch = packing.collate(passages, pad_id=1, masking=masking, step=3)
    ends = batch.passage_ends.tolist()[: len(passages) + 1]
    rows = [(batch.input_ids[:, s:e], batch.labels[:, s:e]) for s, e in itertools.pairwise(ends)]
    expected = one_at_a_time(model, rows)
    expected_gradients = gradients(model)
    objectives.prepare(model, family)
    loss = objectives.loss_sum(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    num_labels = sum(each.num_labels(masking) for each in passages)
    assert int(batch.labels.ne(IGNORED).sum()) == num_labels > 10
    assert loss.item() / num_labels == pytest.approx(expected / num_labels, abs=1e-5)
    assert_alike(gradients(model), expected_gradients)


def test_masks_are_those_of_bert_and_differ_by_step_and_passage() -> None:
    masking = Masking(mask_id=4, vocab_size=10_000, seed=1)
    ids = np.arange(1000, 3000, dtype=np.int32)
    masked, labels = masking.apply(ids, step=0, passage_number=7)
    chosen = labels != IGNORED
    assert (labels[chosen] == ids[chosen]).all()
    assert (masked[~chosen] == ids[~chosen]).all()
    assert not chosen[0]
    assert not chosen[-1]
    assert chosen.sum() == round(0.15 * 1998) == masking.num_masked(2000)
    kinds = masked[chosen]
    assert (kinds == 4).mean() == pytest.approx(0.8, abs=0.06)
    assert (kinds == ids[chosen]).mean() == pytest.approx(0.1, abs=0.05)
    again, _ = masking.apply(ids, step=0, passage_number=7)
    other_step, _ = masking.apply(ids, step=1, passage_number=7)
    other_passage, _ = masking.apply(ids, step=0, passage_number=8)
    assert (masked == again).all()
    assert (masked != other_step).any()
    assert (masked != other_passage).any()
    for length in (1, 2):
        assert masking.num_masked(length) == 0
        assert (masking.apply(ids[:length], step=0, passage_number=0)[1] == IGNORED).all()


def test_the_chunked_loss_equals_transformers_own(tmp_path: Path) -> None:
    """Over several chunks, and with the head's own weight trained."""
    model = AutoModelForCausalLM.from_pretrained(
        factories.tiny_decoder(tmp_path / "m", tie_word_embeddings=False), dtype=torch.float32
    )
    ids = torch.randint(2, 300, (3, 240))
    theirs = model(input_ids=ids, labels=ids).loss
    theirs.backward()
    expected = gradients(model)
    objectives.prepare(model, "m")
    blocks = [Block(row.numpy().astype(np.int32), (240,), (0,)) for row in ids]
    ours = objectives.loss_sum(model, packing.collate(blocks, pad_id=1)) / (3 * 239)
    ours.backward()  # type: ignore[no-untyped-call]
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    for name, each in gradients(model).items():
        assert torch.allclose(each, expected[name], atol=1e-6), name


def test_the_prepared_model_still_gives_logits_and_its_own_weights(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(factories.tiny_decoder(tmp_path / "m"), dtype=torch.float32)
    names = list(model.state_dict())
    weight = model.get_output_embeddings().weight
    objectives.prepare(model, "m")
    assert list(model.state_dict()) == names
    assert model.get_output_embeddings().weight is weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.set_output_embeddings(torch.nn.Identity()), "no linear output layer"),
        (lambda model: setattr(model.config, "final_logit_softcapping", 30.0), "final_logit_softcapping = 30.0"),
    ],
)
def test_a_model_that_would_be_trained_wrongly_is_refused(spoil: Callable[[Any], None], message: str) -> None:
    model = decoder("llama")
    spoil(model)
    with pytest.raises(ModelError, match=message):
        objectives.prepare(model, "mine")


def test_capped_attention_scores_are_refused() -> None:
    ends, rows = torch.tensor([0, 4], dtype=torch.int32), torch.randn(1, 2, 4, 8)
    with pytest.raises(ModelError, match="wants softcap"):
        attention.attend(torch.nn.Module(), rows, rows, rows, None, cu_seq_lens_q=ends, max_length_q=4, softcap=50.0)
