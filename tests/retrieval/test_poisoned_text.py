"""A text that overflows gives NaN for itself and for nobody else in its batch."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from readapt_ray.catalog.models import open_model
from readapt_ray.errors import InputError
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.exact import search_exact
from readapt_ray.weights.loading import in_float32
from tests import factories

POISON = 7
"""The token whose embedding is infinite."""
TEXTS = [[20, 21, 22, 23], [30, 31], [40, 41, 42, 43, 44, 45, 46, 47, 48], [50], [60, 61, 62]]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """Encoder and decoder in which one token overflows, also where a batch is filled with the token 0."""
    folders = {}
    for kind, make in (("decoder", factories.tiny_decoder), ("encoder", factories.tiny_encoder)):
        for token in (0, POISON):
            folder = factories.write_contract(make(tmp_path_factory.mktemp(kind) / f"{token}"), pooling="mean")
            tensors = load_file(folder / "model.safetensors")
            name = next(each for each in tensors if each.endswith(("embed_tokens.weight", "word_embeddings.weight")))
            tensors[name][token] = torch.inf
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            folders[kind, token] = folder
    return folders


def _encoder(folder, pooling, packed):
    contract = json.loads((folder / "readapt.json").read_text())
    contract["encoding"]["pooling"] = pooling
    (folder / "readapt.json").write_text(json.dumps(contract))
    return Encoder.load(open_model(str(folder)), packed=packed, batch_tokens=4096)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("position", range(len(TEXTS)))
def test_only_its_own_text_fails(poisoned, kind, pooling, packed, position):
    encoder = _encoder(poisoned[kind, POISON], pooling, packed)
    assert encoder.is_packed == packed
    clean = encoder.encode_ids(TEXTS)
    assert np.isfinite(clean).all()
    texts = [[POISON, *row] if number == position else row for number, row in enumerate(TEXTS)]
    found = encoder.encode_ids(texts)
    others = [number for number in range(len(TEXTS)) if number != position]
    assert np.allclose(found[others], clean[others], atol=1e-6)
    assert not np.isfinite(found[position]).all()


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("position", range(len(TEXTS)))
def test_an_overflow_in_float16_spoils_its_own_text_only(poisoned, tmp_path, kind, position):
    """Finite weights, as published models have them: a number over 65,504 is infinite in float16."""
    folder = tmp_path / "model"
    shutil.copytree(poisoned[kind, POISON], folder)
    tensors = {name: tensor.clamp(max=1e6) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    texts = [[POISON, *row] if number == position else row for number, row in enumerate(TEXTS)]
    others = [number for number in range(len(TEXTS)) if number != position]
    half = Encoder.load(open_model(str(folder)), dtype="float16", packed=True, batch_tokens=4096)
    found, clean = half.encode_ids(texts), half.encode_ids(TEXTS)
    assert np.allclose(found[others], clean[others], atol=1e-3)
    assert not np.isfinite(found[position]).all()
    assert np.isfinite(Encoder.load(open_model(str(folder)), packed=True).encode_ids(texts)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_overflows_is_encoded_again_in_float32(poisoned, tmp_path, dtype):
    """The weights are as they were afterwards, and what float32 does not mend stays as it was."""
    folder = tmp_path / "model"
    shutil.copytree(poisoned["decoder", POISON], folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(each for each in tensors if each.endswith("embed_tokens.weight"))
    tensors[name][POISON] = 1e37 if dtype == "bfloat16" else 1e4
    tensors[name][POISON + 1] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    texts = [*TEXTS, [POISON, 20, 21], [POISON + 1, 20]]
    encoder = Encoder.load(open_model(str(folder)), dtype=dtype, packed=True, batch_tokens=4096)
    forward = encoder._forward_pass.pooled
    encoder._forward_pass.pooled = lambda rows: _overflowing(encoder.network, rows, forward(rows))
    before = {key: tensor.clone() for key, tensor in encoder.network.state_dict().items()}
    assert [bool(np.isfinite(each).all()) for each in encoder.encode_ids(texts)] == [True] * 5 + [False] * 2
    found = encoder.encode_usable(texts)
    assert [bool(np.isfinite(each).all()) for each in found] == [True] * 6 + [False]
    assert encoder.work.num_again == 2
    due = Encoder.load(open_model(str(folder)), packed=True).encode_ids(texts[:6])
    assert np.abs(found[5] - due[5]).max() < 0.05
    for key, tensor in encoder.network.state_dict().items():
        assert tensor.dtype == before[key].dtype and torch.equal(tensor.nan_to_num(), before[key].nan_to_num()), key


def test_without_memory_for_float32_nothing_is_encoded_again_or_counted(poisoned, caplog, monkeypatch):
    encoder = Encoder.load(
        open_model(str(poisoned["decoder", POISON])), dtype="bfloat16", packed=True, batch_tokens=4096
    )
    huge = torch.zeros(1, dtype=torch.bfloat16).expand(1 << 50)  # 4 PB in float32
    encoder.network.register_parameter("huge", torch.nn.Parameter(huge, requires_grad=False))
    texts = [*TEXTS, [POISON, 20, 21]]
    found = encoder.encode_usable(texts)
    assert [bool(np.isfinite(each).all()) for each in found] == [True] * 5 + [False]
    assert encoder.work.num_again == 0
    assert "no memory to compute in float32" in caplog.text and "encoded again in" not in caplog.text
    assert {each.dtype for each in encoder.network.parameters()} == {torch.bfloat16}
    monkeypatch.setattr(torch.Tensor, "float", lambda self: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"), in_float32(torch.nn.Linear(2, 2, dtype=torch.bfloat16)):
        pytest.fail("only a lack of memory is not an error")


def _overflowing(network, rows, vectors):
    """On a CPU half the sums are made in float32, so what overflows on a GPU is made NaN by hand."""
    if next(network.parameters()).dtype != torch.float32:
        vectors[[row[0] == POISON for row in rows]] = torch.nan
    return vectors


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_token_that_no_text_has_spoils_none(poisoned, kind, packed):
    assert np.isfinite(_encoder(poisoned[kind, 0], "mean", packed).encode_ids(TEXTS)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_query_without_a_direction_is_refused_and_not_ranked(value):
    queries = np.ones((3, 4), np.float32)
    queries[1, 2] = value
    with pytest.raises(InputError, match="1 of 3 query vectors hold NaN or infinity, first number 1"):
        search_exact(queries, [(["a", "b"], np.ones((2, 4), np.float32))], 1)
