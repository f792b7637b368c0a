"""InfoNCE against sentence-transformers' own, with hard negatives, in one pass and with cached gradients."""

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

from readapt_ray.catalog.retrievers import Encoding
from readapt_ray.storage import Location
from readapt_ray.training.contrastive import Contrast
from readapt_ray.training.engine import seed_part
from readapt_ray.training.pairs import PAIR_SCHEMA, PairReader
from tests import factories

NUM_PAIRS = 6


def reader(folder: Path, num_negatives: int) -> PairReader:
    random = np.random.default_rng(0)

    def text() -> list[int]:
        return [2, *random.integers(10, 150, random.integers(3, 12)).tolist(), 3]

    numbers = range(NUM_PAIRS)
    columns = {
        "query_ids": [text() for _ in numbers],
        "passage_ids": [text() for _ in numbers],
        "doc_number": list(numbers),
        "doc_id": [f"d{number}" for number in numbers],
        "negative_ids": [[text() for _ in range(num_negatives)] for _ in numbers],
        "negative_numbers": [[100 + number * 10 + each for each in range(num_negatives)] for number in numbers],
    }
    folder.mkdir()
    pq.write_table(pa.table(columns, schema=PAIR_SCHEMA), folder / "part-0.parquet")
    return PairReader(Location(str(folder)), batch_size=NUM_PAIRS, num_epochs=1, seed=0)


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
    )
    engine: Any = SimpleNamespace(num_workers=1, worker_rank=0, device=torch.device("cpu"))
    work = contrast.work(engine, np.arange(NUM_PAIRS), step=0)
    model.zero_grad()
    total = 0.0
    for index, (part, weight) in enumerate(work.parts):
        seed_part(5, 0, index)
        loss = work.loss_of(part) * weight
        loss.backward()
        total += loss.item()
    return total, len(work.parts)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("num_negatives", [0, 1])
@pytest.mark.parametrize("micro_batch_tokens", [100_000, 30])
def test_loss_and_gradients_equal_sentence_transformers(
    tmp_path: Path, num_negatives: int, micro_batch_tokens: int
) -> None:
    base = factories.tiny_encoder(tmp_path / "m")
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
    loss, num_parts = our_loss(model, pairs, micro_batch_tokens)
    assert (num_parts > 1) == (micro_batch_tokens == 30)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    assert max(float(each.abs().max()) for each in found.values()) > 1e-3
    for name, each in found.items():
        assert torch.allclose(each, expected_gradients[name], atol=1e-5), name


def test_cached_gradients_replay_dropout(tmp_path: Path) -> None:
    model = Transformer(str(factories.tiny_encoder(tmp_path / "m"))).auto_model.train()
    pairs = reader(tmp_path / "pairs", 1)
    first, num_parts = our_loss(model, pairs, 30, both_directions=True)
    kept = gradients(model)
    again, _ = our_loss(model, pairs, 30, both_directions=True)
    assert num_parts > 2
    assert first == again
    assert all(torch.equal(each, kept[name]) for name, each in gradients(model).items())
