import json
import math
import signal
import subprocess
import sys

import pytest
import torch

from readapt_ray.errors import ModelError, WeightMismatchError
from readapt_ray.storage import Location
from readapt_ray.weights import low_rank
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.low_rank import StoredDifference, truncated_svd, write_difference
from readapt_ray.weights.merging import Readapter, Scales
from readapt_ray.weights.weight_files import Checkpoint
from tests import factories


def _decaying(rows, columns, rate, seed=0):
    """A matrix whose singular values fall as exp(-rate * i)."""
    generator = torch.Generator().manual_seed(seed)
    side = min(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, side, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(columns, side, generator=generator, dtype=torch.float64)).Q
    return (U * torch.exp(-rate * torch.arange(side)) @ V.T).float()


def _shares(matrix):
    """Explained variance by rank, from torch's own decomposition in float64."""
    squares = torch.linalg.svdvals(matrix.double()).square()
    return squares.cumsum(0) / squares.sum()


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
@pytest.mark.parametrize("variance", [0.3, 0.5, 0.9])
def test_small_matrices_have_the_fewest_directions_that_hold_enough(shape, variance):
    matrix = _decaying(*shape, rate=0.05)
    B, A, reached = truncated_svd(matrix, variance, seed=0)
    needed = 1 + int((_shares(matrix) < variance).sum())
    assert needed <= A.shape[0] <= needed + 1
    left = (matrix.double() - B.double() @ A.double()).square().sum() / matrix.double().square().sum()
    assert reached == pytest.approx(1 - left.item(), abs=1e-6)
    assert reached >= variance
    best = _shares(matrix)[A.shape[0] - 1].item()
    assert best - 1e-4 <= reached <= best + 1e-6


@pytest.mark.parametrize("shape", [(600, 900), (900, 600)])
@pytest.mark.parametrize("rate", [0.002, 0.01, 0.1])
def test_large_matrices_through_a_sketch_come_close_to_the_best(shape, rate):
    matrix = _decaying(*shape, rate=rate)
    variance = 0.5
    B, A, reached = truncated_svd(matrix, variance, seed=1)
    needed = 1 + int((_shares(matrix) < variance).sum())
    assert needed <= A.shape[0] <= math.ceil(1.03 * needed) + 1
    left = (matrix.double() - B.double() @ A.double()).square().sum() / matrix.double().square().sum()
    assert reached == pytest.approx(1 - left.item(), abs=1e-6)
    assert reached >= variance
    again = truncated_svd(matrix, variance, seed=1)
    assert torch.equal(A, again[1])


@pytest.mark.parametrize("side", [64, 600])
def test_a_flat_spectrum_is_kept_whole(side):
    matrix = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    assert truncated_svd(matrix, 0.99, seed=0) is None


def _models(tmp_path, **options):
    pretrained = factories.tiny_decoder(tmp_path / "pre", **options)
    return pretrained, factories.full_retriever(tmp_path / "ret", pretrained)


def _write(pretrained, tuned, target, variance):
    seen = []
    stored = write_difference(pretrained, tuned, Location(str(target)), variance=variance, report=seen.append)
    assert seen == sorted(seen)
    return stored


def test_the_whole_difference_gives_the_retriever_back(tmp_path):
    pretrained, retriever = _models(tmp_path, dtype="bfloat16")
    before, after = Checkpoint(pretrained), Checkpoint(retriever)
    stored = _write(before, after, tmp_path / "d.safetensors", None)
    assert {each.rank for each in stored} == {None}
    back = Readapter(before, StoredDifference(tmp_path / "d.safetensors", before, name="d"))
    for name, tensor in back.walk(Scales(1.0, ())):
        assert torch.equal(tensor, after.read(name).float())
    for name, tensor in back.walk(Scales(0.0, ())):
        assert torch.equal(tensor, before.read(name).float())


def test_a_file_among_the_parts_that_is_not_ours_stays(tmp_path):
    pretrained, tuned = (Checkpoint(folder) for folder in _models(tmp_path))
    parts = tmp_path / "out.parts"
    parts.mkdir()
    (parts / "notes.json").write_text("precious")
    _write(pretrained, tuned, tmp_path / "out", 0.5)
    assert [path.name for path in parts.iterdir()] == ["notes.json"]


def test_an_adapter_is_found_again_at_its_own_rank(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path / "pre")
    before = Checkpoint(pretrained)
    adapter = Adapter(factories.lora_adapter(tmp_path / "lora", pretrained, rank=4), before)
    stored = {each.name: each for each in _write(before, adapter, tmp_path / "d.safetensors", 0.9999)}
    assert {stored[name].rank for name in adapter.names()} <= {3, 4}
    assert all(stored[name].variance >= 0.9999 for name in adapter.names())
    back = StoredDifference(tmp_path / "d.safetensors", before, name="d")
    for name in before.names():
        assert (name in back) == (name in adapter)
        if name in adapter:
            weight = before.read(name)
            wanted = adapter.factors(name).update(weight)
            assert (back.factors(name).update(weight) - wanted).norm() < 0.011 * wanted.norm()


def test_vectors_are_kept_whole_and_what_did_not_change_is_left_out(tmp_path):
    pretrained, retriever = _models(tmp_path)
    tensors = factories.read_tensors(retriever)
    tensors["layers.0.mlp.up_proj.weight"] = factories.read_tensors(pretrained)["model.layers.0.mlp.up_proj.weight"]
    factories.write_tensors(retriever, tensors)
    before = Checkpoint(pretrained)
    stored = {each.name: each for each in _write(before, Checkpoint(retriever), tmp_path / "d.safetensors", 0.3)}
    assert stored["layers.0.mlp.up_proj.weight"].rank == 0
    assert "layers.0.mlp.up_proj.weight" not in StoredDifference(tmp_path / "d.safetensors", before, name="d")
    assert stored["norm.weight"].rank is None
    assert 1 <= stored["layers.0.mlp.down_proj.weight"].rank < 16


@pytest.mark.parametrize("side", ["pre", "ret"])
def test_nan_is_refused_by_name(tmp_path, side):
    pretrained, retriever = _models(tmp_path, headless=True)
    tensors = factories.read_tensors(tmp_path / side)
    tensors["layers.1.mlp.up_proj.weight"][2, 3] = math.nan
    factories.write_tensors(tmp_path / side, tensors)
    with pytest.raises(ModelError, match=rf"layers\.1\.mlp\.up_proj\.weight' of '{side}'"):
        _write(Checkpoint(pretrained, name="pre"), Checkpoint(retriever, name="ret"), tmp_path / "d", 0.5)


def test_a_file_of_another_model_is_refused(tmp_path):
    pretrained, retriever = _models(tmp_path)
    _write(Checkpoint(pretrained), Checkpoint(retriever), tmp_path / "d.safetensors", 0.5)
    wide = Checkpoint(factories.tiny_decoder(tmp_path / "wide", hidden_size=64), name="wide")
    with pytest.raises(WeightMismatchError, match=r"'d' was not made from 'wide'"):
        StoredDifference(tmp_path / "d.safetensors", wide, name="d")
    with pytest.raises(ModelError, match="which is not a stored difference"):
        StoredDifference(pretrained / "model.safetensors", wide, name="d")


KILLED = """
import os, signal, sys
from pathlib import Path
from readapt_ray.storage import Location
from readapt_ray.weights import low_rank
from readapt_ray.weights.weight_files import Checkpoint
svd, count = low_rank.truncated_svd, []
def counting(*given, **options):
    count.append(1)
    if len(count) > 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return svd(*given, **options)
low_rank.truncated_svd = counting
before, after, target = sys.argv[1:]
low_rank.write_difference(
    Checkpoint(Path(before)), Checkpoint(Path(after)), Location(target), variance=0.5, report=lambda done: None)
"""


def test_a_killed_decomposition_goes_on_with_the_same_bytes(tmp_path, monkeypatch):
    pretrained, retriever = _models(tmp_path)
    before, after = Checkpoint(pretrained), Checkpoint(retriever)
    whole = _write(before, after, tmp_path / "whole.safetensors", 0.5)
    target = tmp_path / "killed.safetensors"
    done = subprocess.run([sys.executable, "-c", KILLED, str(pretrained), str(retriever), str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    finished = len(list((tmp_path / "killed.safetensors.parts").glob("*.json")))
    assert finished >= 2
    assert not target.exists()
    calls = []
    svd = low_rank.truncated_svd
    monkeypatch.setattr(low_rank, "truncated_svd", lambda *g, **o: calls.append(1) or svd(*g, **o))
    assert _write(before, after, target, 0.5) == whole
    assert 0 < len(calls) < sum(len(each.shape) == 2 for each in whole)
    assert target.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not (tmp_path / "killed.safetensors.parts").exists()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_same_bytes_by_any_number_of_cores(tmp_path, monkeypatch, num_threads):
    pretrained, retriever = _models(tmp_path, hidden_size=64)
    monkeypatch.setattr(low_rank, "_EXACT_SIDE", 8)
    _write(Checkpoint(pretrained), Checkpoint(retriever), tmp_path / "one.safetensors", 0.2)
    monkeypatch.setattr(low_rank, "num_cores", lambda: num_threads)
    _write(Checkpoint(pretrained), Checkpoint(retriever), tmp_path / "two.safetensors", 0.2)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert json.loads((tmp_path / "one.safetensors.json").read_text())[0].keys() == {
        "name",
        "shape",
        "rank",
        "variance",
    }
