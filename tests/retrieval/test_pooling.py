import numpy as np
import pytest
import torch

from readapt_ray.retrieval.pooling import normalized, pool

LENGTHS = (4, 1, 3)


def _padded(side, dtype=torch.float32, num_tokens=6):
    """Three texts of 4, 1 and 3 tokens; padded places hold NaN, which must never be seen."""
    rng = np.random.default_rng(0)
    hidden = torch.full((3, num_tokens, 5), float("nan"), dtype=dtype)
    mask = torch.zeros(3, num_tokens, dtype=torch.long)
    rows = []
    for index, length in enumerate(LENGTHS):
        first = {"right": 0, "left": num_tokens - length, "both": 1}[side]
        values = torch.tensor(rng.normal(size=(length, 5)), dtype=dtype)
        hidden[index, first : first + length] = values
        mask[index, first : first + length] = 1
        rows.append(values.double().numpy())
    return hidden, mask, rows


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_padding_on_any_side_is_not_seen(side, pooling):
    hidden, mask, rows = _padded(side)
    by_hand = {"last": lambda row: row[-1], "cls": lambda row: row[0], "mean": lambda row: row.mean(axis=0)}[pooling]
    found = pool(hidden, mask, pooling)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), [by_hand(row) for row in rows], rtol=1e-6)


def test_half_precision_is_summed_in_float32():
    hidden = torch.full((1, 4096, 2), 30.0, dtype=torch.float16)
    assert pool(hidden, torch.ones(1, 4096), "mean").tolist() == [[30.0, 30.0]]
    assert pool(hidden.bfloat16(), torch.ones(1, 4096), "mean").tolist() == [[30.0, 30.0]]


def test_normalized_rows_have_length_one():
    vectors = torch.tensor([[3.0, 4.0], [3e-5, 4e-5], [0.0, 0.0]], dtype=torch.float16)
    found = normalized(vectors)
    assert found.dtype == torch.float32
    assert found[0].tolist() == pytest.approx([0.6, 0.8])
    assert float(found[1].norm()) == pytest.approx(1.0)
    assert found[2].tolist() == [0.0, 0.0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not go together"):
        pool(torch.zeros(2, 3, 4), torch.ones(2, 4), "mean")
    with pytest.raises(ValueError, match="'max' is unknown"):
        pool(torch.zeros(2, 3, 4), torch.ones(2, 3), "max")
