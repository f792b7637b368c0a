"""InfoNCE against sentence-transformers' own, with hard negatives, in one pass and with cached gradients."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.models import Normalize, Pooling, Transformer

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.errors import ModelError
from readapt_ray.storage import Location
from readapt_ray.training import contrastive
from readapt_ray.training.contrastive import Contrast, encode
from readapt_ray.training.dora import AdapterShape, adapted_layers, add_adapters, refresh
from readapt_ray.training.engine import seed_dropout
from readapt_ray.training.pairs import PAIR_SCHEMA, PairReader, Texts
from tests import factories

NUM_PAIRS = 6


def reader(folder: Path, num_negatives: int) -> PairReader:
    random = np.random.default_rng(0)

    def text() -> list[int]:
        return [2, *random.integers(10, 150, random.integers(3, 12)).tolist(), 3]

    numbers = range(NUM_PAIRS)
    columns = {
        "query_ids": [text() for _ in numbers],
        "query_number": list(numbers),
        "passage_ids": [text() for _ in numbers],
        "doc_number": list(numbers),
        "doc_id": [f"d{number}" for number in numbers],
        "negative_ids": [[text() for _ in range(num_negatives)] for _ in numbers],
        "negative_numbers": [[100 + number * 10 + each for each in range(num_negatives)] for number in numbers],
        "document_number": [None] * NUM_PAIRS,
        "negative_document_numbers": [None] * NUM_PAIRS,
    }
    folder.mkdir()
    pq.write_table(pa.table(columns, schema=PAIR_SCHEMA), folder / "part-0.parquet")
    return PairReader(Location(str(folder)), batch_size=NUM_PAIRS, num_epochs=1, seed=0)


def test_a_large_seed_is_not_taken_for_a_later_epoch_of_a_small_one(tmp_path: Path) -> None:
    reader(tmp_path / "pairs", 0)

    def order(seed: int, epoch: int) -> list[int]:
        pairs = PairReader(Location(str(tmp_path / "pairs")), batch_size=NUM_PAIRS, num_epochs=2, seed=seed)
        return list(pairs.steps(0))[epoch].tolist()

    assert order(0, 1) != order(2**32, 0), "NumPy takes [2**32, 0] and [0, 1] for one seed"
    assert order(0, 1) == order(0, 1)


def our_loss(model: Any, pairs: PairReader, micro_batch_tokens: int, **options: Any) -> tuple[float, int]:
    """The loss of one step, its gradients in the model, and the number of passes."""
    contrast = Contrast(
        model=model,
        reader=pairs,
        encoding=Encoding(pooling="mean", add_bos=True, add_eos=True),
        temperature=0.05,
        both_directions=options.get("both_directions", False),
        micro_batch_tokens=micro_batch_tokens,
        dtype=torch.float32,
        seed=5,
        queries_only=options.get("queries_only", False),
    )
    engine: Any = SimpleNamespace(num_workers=1, worker_rank=0, device=torch.device("cpu"))
    work = contrast.work(engine, np.arange(NUM_PAIRS), step=0)
    model.zero_grad()
    total = 0.0
    for index, (part, weight) in enumerate(work.parts):
        seed_dropout(5, step=0, worker_rank=0, part=index)
        loss = work.loss_of(part) * weight
        loss.backward()
        total += loss.item()
    return total, len(work.parts)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("num_negatives", [0, 1])
@pytest.mark.parametrize("micro_batch_tokens", [100_000, 30])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("make", [factories.tiny_encoder, factories.tiny_decoder])
def test_loss_and_gradients_equal_sentence_transformers(
    tmp_path: Path, num_negatives: int, micro_batch_tokens: int, packed: bool, make: Any
) -> None:
    base = make(tmp_path / "m")
    transformer = Transformer(str(base))
    model = transformer.auto_model.eval()
    theirs = SentenceTransformer(
        modules=[transformer, Pooling(model.config.hidden_size, pooling_mode="mean"), Normalize()], device="cpu"
    ).eval()
    pairs = reader(tmp_path / "pairs", num_negatives)
    texts = pairs.read(np.arange(NUM_PAIRS))

    def features(ids: list[np.ndarray]) -> dict[str, torch.Tensor]:
        rows = [torch.from_numpy(each.astype(np.int64)) for each in ids]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"input_ids": padded, "attention_mask": (padded != 0).long()}

    groups = [texts.token_ids[start : start + NUM_PAIRS] for start in range(0, len(texts.token_ids), NUM_PAIRS)]
    cached = CachedMultipleNegativesRankingLoss(theirs, scale=20.0, mini_batch_size=2)
    with torch.enable_grad():
        expected = cached([features(group) for group in groups], torch.zeros(0))
        expected.backward()
    expected_gradients = gradients(model)
    if packed:
        contrastive.install_packed_attention(model, "m")
        assert contrastive.is_packed(model)
    loss, num_parts = our_loss(model, pairs, micro_batch_tokens)
    assert (num_parts > 1) == (micro_batch_tokens == 30)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    assert max(float(each.abs().max()) for each in found.values()) > 1e-3
    for name, each in found.items():
        assert torch.allclose(each, expected_gradients[name], atol=1e-5), name


def test_an_id_that_the_model_does_not_know_is_named(tmp_path: Path) -> None:
    model = Transformer(str(factories.tiny_encoder(tmp_path / "m"))).auto_model
    model.set_input_embeddings(torch.nn.Embedding(3, model.config.hidden_size))
    with pytest.raises(ModelError, match="but the model has 3 token embeddings"):
        our_loss(model, reader(tmp_path / "pairs", 0), 100_000)


def test_cached_gradients_replay_dropout(tmp_path: Path) -> None:
    model = Transformer(str(factories.tiny_encoder(tmp_path / "m"))).auto_model.train()
    pairs = reader(tmp_path / "pairs", 1)
    first, num_parts = our_loss(model, pairs, 30, both_directions=True)
    kept = gradients(model)
    again, _ = our_loss(model, pairs, 30, both_directions=True)
    assert num_parts > 2
    assert first == again
    assert all(torch.equal(each, kept[name]) for name, each in gradients(model).items())


@pytest.mark.parametrize("micro_batch_tokens", [100_000, 30])
def test_for_queries_alone_passages_are_those_of_the_model_before(tmp_path: Path, micro_batch_tokens: int) -> None:
    base = factories.tiny_encoder(tmp_path / "m")
    before, model = (Transformer(str(base)).auto_model.eval() for _ in range(2))
    add_adapters(model, AdapterShape(method="dora", rank=4, alpha=8, dropout=0.0, targets=factories.ENCODER_TARGETS))
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    refresh(model)
    pairs, encoding = reader(tmp_path / "pairs", 1), Encoding(pooling="mean", add_bos=True, add_eos=True)
    texts, cpu = pairs.read(np.arange(NUM_PAIRS)).token_ids, torch.device("cpu")
    passages = encode(before, texts[NUM_PAIRS:], encoding, device=cpu).detach()
    scores = encode(model, texts[:NUM_PAIRS], encoding, device=cpu) @ passages.T / 0.05
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(NUM_PAIRS))
    expected.backward()
    expected_gradients = gradients(model)
    loss, num_parts = our_loss(model, pairs, micro_batch_tokens, queries_only=True)
    assert (num_parts > 1) == (micro_batch_tokens == 30)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert our_loss(model, pairs, micro_batch_tokens)[0] != pytest.approx(loss, abs=1e-3)
    our_loss(model, pairs, micro_batch_tokens, queries_only=True)
    for name, each in gradients(model).items():
        assert torch.allclose(each, expected_gradients[name], atol=1e-5), name


def contrast_of_vectors(*, both_directions: bool) -> Contrast:
    nothing: Any = None
    return Contrast(
        model=nothing,
        reader=nothing,
        encoding=nothing,
        temperature=0.05,
        both_directions=both_directions,
        micro_batch_tokens=1,
        dtype=torch.float32,
        seed=0,
    )


def numbered(passages: list[int], relevant: list[list[int]], negatives: list[int]) -> Texts:
    return Texts(
        token_ids=[],
        num_pairs=len(passages),
        passage_numbers=np.array(passages, np.int64),
        negative_numbers=np.array(negatives, np.int64),
        relevant=[np.array(each, np.int64) for each in relevant],
    )


@pytest.mark.parametrize("both_directions", [False, True])
def test_a_perfect_model_has_no_loss_on_two_passages_that_answer_one_query(both_directions: bool) -> None:
    query = torch.nn.functional.normalize(torch.ones(1, 8), dim=1)
    other = torch.nn.functional.normalize(torch.tensor([[1.0, -1.0] * 4]), dim=1)
    vectors_TD = torch.cat([query, query, other, query, query, other, query])  # queries, passages, a hard negative
    texts = numbered([0, 1, 2], [[0, 1], [0, 1], [2]], negatives=[1])
    loss = contrast_of_vectors(both_directions=both_directions).loss_share(vectors_TD, [texts], 0)
    assert float(loss) == pytest.approx(0, abs=1e-6)


def info_nce(anchors: np.ndarray, candidates: np.ndarray, is_negative: np.ndarray) -> float:
    """The sum over anchors, by its definition: the candidate of the same place against the negatives."""
    scores = np.exp(anchors @ candidates.T / 0.05)
    return -sum(np.log(row[at] / (row[at] + row[is_negative[at]].sum())) for at, row in enumerate(scores))


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("both_directions", [False, True])
def test_what_answers_a_query_is_no_negative_on_any_worker(
    num_workers: int, both_directions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(4)
    pairs = [(0, 0), (0, 1), (1, 1), (2, 3), (3, 2), (3, 4), (0, 1)]
    answers = {query: sorted({number for each, number in pairs if each == query}) for query, _ in pairs}
    negatives = [1, 2, 9, 4, 0, 8, 3]
    size = (len(pairs), 8)
    query_BD, passage_BD, negative_BD = (random.normal(size=size) / 8 for _ in range(3))
    is_right = np.array([[number in answers[query] for _, number in pairs] for query, _ in pairs])
    hard = np.array([[number in answers[query] for number in negatives] for query, _ in pairs])
    candidates = np.concatenate([passage_BD, negative_BD])
    expected = info_nce(query_BD, candidates, ~np.concatenate([is_right, hard], axis=1))
    if both_directions:
        expected = (expected + info_nce(passage_BD, query_BD, ~is_right.T)) / 2

    mine = [list(range(rank, len(pairs), num_workers)) for rank in range(num_workers)]
    shares = [
        numbered([pairs[at][1] for at in own], [answers[pairs[at][0]] for at in own], [negatives[at] for at in own])
        for own in mine
    ]
    total = 0.0
    for rank, own in enumerate(mine):
        order = [at for each in mine for at in each]
        gathered = [torch.from_numpy(each[order]) for each in (passage_BD, negative_BD, query_BD)]

        def gather(_: torch.Tensor, lengths: list[int], met: list[torch.Tensor] = gathered) -> torch.Tensor:
            assert lengths == [len(each) for each in mine]
            return met.pop(0)

        monkeypatch.setattr(contrastive, "_gathered", gather)
        vectors_TD = torch.from_numpy(np.concatenate([each[own] for each in (query_BD, passage_BD, negative_BD)]))
        total += float(contrast_of_vectors(both_directions=both_directions).loss_share(vectors_TD, shares, rank))
    assert total == pytest.approx(expected / len(pairs), rel=1e-6)


def test_the_reader_knows_all_passages_that_answer_a_query(tmp_path: Path) -> None:
    columns = {
        "query_ids": [[1]] * 5,
        "query_number": [7, 2, 7, 7, 0],
        "passage_ids": [[1]] * 5,
        "doc_number": [3, 3, 1, 1, 9],
        "doc_id": ["d"] * 5,
        "negative_ids": [[]] * 5,
        "negative_numbers": [[]] * 5,
        "document_number": [None] * 5,
        "negative_document_numbers": [None] * 5,
    }
    pq.write_table(pa.table(columns, schema=PAIR_SCHEMA), tmp_path / "part-0.parquet")
    texts = PairReader(Location(str(tmp_path)), batch_size=2, num_epochs=1, seed=0).read(np.array([2, 4, 1]))
    assert [each.tolist() for each in texts.relevant] == [[1, 3], [9], [3]]


@pytest.mark.parametrize("num_negatives", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_no_step_takes_more_tokens_than_the_reader_says(tmp_path: Path, num_negatives: int, packed: bool) -> None:
    pairs = reader(tmp_path / "pairs", num_negatives)
    model = Transformer(str(factories.tiny_encoder(tmp_path / "m"))).auto_model
    if packed:
        contrastive.install_packed_attention(model, "m")
    contrast = dataclasses.replace(contrast_of_vectors(both_directions=False), reader=pairs, model=model)
    contrast = dataclasses.replace(contrast, micro_batch_tokens=100_000)
    engine: Any = SimpleNamespace(num_workers=1, worker_rank=0, device=torch.device("cpu"))
    work = contrast.work(engine, np.arange(NUM_PAIRS), step=0)
    if packed:
        assert work.num_tokens <= work.num_slots < work.num_tokens + 16
    else:
        assert work.num_slots == pairs.most_tokens(1)
    assert work.num_slots <= pairs.most_tokens(1) == 3 * pairs.most_tokens(4)


def test_vectors_are_cut_before_they_are_normalised(tmp_path: Path) -> None:
    model = Transformer(str(factories.tiny_encoder(tmp_path / "m"))).auto_model.eval()
    ids = [np.array([2, 5, 7, 3]), np.array([2, 9, 3])]
    whole, cut = (
        encode(
            model,
            ids,
            Encoding(pooling="mean", add_bos=True, add_eos=True, dimensions=dimensions),
            device=torch.device("cpu"),
        )
        for dimensions in (None, 8)
    )
    assert cut.shape == (2, 8)
    torch.testing.assert_close(cut, torch.nn.functional.normalize(whole[:, :8], dim=1))


@pytest.mark.parametrize("make", [factories.tiny_decoder, factories.tiny_encoder])
@pytest.mark.parametrize("poison", [0, 7])
@pytest.mark.parametrize("packed", [False, True])
def test_padding_carries_no_overflow_into_another_text(tmp_path, make, poison, packed):
    """Neither that of a token which no text has, nor that of one which another text has."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(make(tmp_path / "model"))).eval()
    if packed:
        contrastive.install_packed_attention(model, "m")
    encoding = Encoding(pooling="mean", add_bos=True, add_eos=True)
    texts = [np.array(ids) for ids in ([20, 21, 22, 23, 24], [30, 31], [40])]
    with torch.no_grad():
        clean = encode(model, texts, encoding, device=torch.device("cpu"))
        model.get_input_embeddings().weight[poison] = torch.inf
        texts[1] = np.array([poison or 30, 31])
        found = encode(model, texts, encoding, device=torch.device("cpu"))
    torch.testing.assert_close(found[[0, 2]], clean[[0, 2]], atol=1e-6, rtol=0)
    assert bool(found[1].isfinite().all()) == (poison == 0)
