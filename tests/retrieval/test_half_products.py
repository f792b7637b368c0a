"""Float16 products of float32 queries: the scores of float32, at every magnitude, and only on devices where they are right."""

import logging

import numpy as np
import pytest
import torch

from readapt_ray.retrieval import exact, half_products
from readapt_ray.retrieval.exact import search_exact
from readapt_ray.retrieval.half_products import HalfQueries, has_half_products

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@DEVICES
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 0.02, 1.0, 3e4, 1e30])
def test_scores_are_as_near_to_float64_as_those_of_float32(device, magnitude):
    random = torch.Generator().manual_seed(0)
    queries = torch.randn(40, 384, generator=random) * magnitude
    queries[:, ::7] *= 1e-4  # small numbers beside large ones
    vectors = torch.randn(300, 384, generator=random).half()
    wanted = queries.double() @ vectors.double().T
    norms = queries.double().norm(dim=1, keepdim=True) * vectors.double().norm(dim=1)

    found = HalfQueries(queries.to(device)).scores(vectors.to(device)).cpu()

    assert found.dtype == torch.float32
    assert ((found.double() - wanted).abs() / norms).max() < 3e-7  # float32's own sums: 1e-7


@DEVICES
def test_a_query_of_zeros_scores_zero(device):
    assert not HalfQueries(torch.zeros(2, 8, device=device)).scores(torch.ones(3, 8, device=device).half()).any()


def test_ties_stay_ties(monkeypatch):
    monkeypatch.setattr(exact, "has_half_products", lambda device, dtype: dtype == torch.float16)
    random = np.random.default_rng(0)
    queries = random.normal(size=(5, 64)).astype(np.float32)
    distinct = random.normal(size=(20, 64)).astype(np.float16)
    doc_ids, vectors = [f"d{number:02d}" for number in range(40)][::-1], np.concatenate([distinct, distinct])

    hits = search_exact(queries, [(doc_ids[:25], vectors[:25]), (doc_ids[25:], vectors[25:])], 10)

    wanted = search_exact(queries, [(doc_ids, vectors.astype(np.float32))], 10)
    assert hits.doc_ids.tolist() == wanted.doc_ids.tolist()
    np.testing.assert_allclose(hits.scores, wanted.scores, rtol=1e-6)
    assert (hits.scores[:, ::2] == hits.scores[:, 1::2]).all()


@pytest.mark.parametrize("failing", ["wrong", "missing"])
def test_a_device_whose_products_are_wrong_or_missing_widens_the_vectors(monkeypatch, caplog, failing):
    def product(rows, vectors):
        if failing == "missing":
            raise TypeError("mm() got an unexpected keyword argument 'out_dtype'")
        return (rows @ vectors.T).float()  # sums in float16

    monkeypatch.setattr(half_products, "_product", product)
    half_products._is_right.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not half_products._is_right(torch.device("cpu"))
    finally:
        half_products._is_right.cache_clear()
    assert "widened to float32 for exact search on cpu" in caplog.text


def test_only_float16_on_gpus_is_multiplied_so():
    assert half_products._is_right(torch.device("cpu"))
    assert not has_half_products(torch.device("cpu"), torch.float16)
    assert not has_half_products(torch.device("cuda"), torch.float32)


@pytest.mark.gpu
def test_this_gpu_has_right_half_products():
    assert has_half_products(torch.device("cuda"), torch.float16)
