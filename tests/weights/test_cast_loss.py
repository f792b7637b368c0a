import pytest
import torch

from readapt_ray.storage import Location
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.cast_loss import CastLoss
from readapt_ray.weights.export import plan_shards, write_weights
from readapt_ray.weights.merging import Readapter, Scales, TensorRows
from readapt_ray.weights.reused_buffers import ScratchBuffers
from readapt_ray.weights.weight_files import Checkpoint
from tests import factories


def test_by_hand():
    # 1 + 2^-9 is halfway between two bfloat16 numbers and goes to the even one, 1; 1 + 2^-7 is one of them.
    exact = torch.tensor([1 + 2**-9, 1 + 2**-7])
    rows = TensorRows(readapted=exact, pretrained=torch.ones(2), retrieval=torch.tensor([1.0, 1 + 2**-7]))
    loss = CastLoss.of("layers.12.mlp.weight", rows, exact.bfloat16(), ScratchBuffers())
    update, knowledge, error = 2**-18 + 2**-14, 2**-18, 2**-18
    assert loss.survives() == {
        "layers.*.mlp.weight": {"update": pytest.approx(1 - error / update), "knowledge": 1 - error / knowledge}
    }


def test_a_merge_says_what_each_kind_of_tensor_lost(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path / "pre", dtype="bfloat16")
    retriever = factories.full_retriever(tmp_path / "ret", pretrained, scale=1e-3)
    before = Checkpoint(pretrained)
    adapter = Adapter(factories.dora_adapter(tmp_path / "ad", pretrained, size=1e-2), before)
    made, scales = Readapter(before, Checkpoint(retriever), [adapter]), Scales(1.0, (0.5,))
    plan = plan_shards(made, dtype="bfloat16", max_shard_bytes=20_000)
    loss = write_weights(made, scales, plan, Location(str(tmp_path / "out")), report=lambda done: None).survives()
    squares = {}
    for name, exact in made.walk(scales):
        start = before.read(name).double()
        kind = name.replace(".0.", ".*.").replace(".1.", ".*.")
        error = (exact.bfloat16().double() - exact.double()).square().sum()
        knowledge = (exact.double() - made.weight(name, Scales(1.0, (0.0,))).double()).square().sum()
        sums = squares.setdefault(kind, [0, 0, 0])
        for place, value in enumerate((error, (exact.double() - start).square().sum(), knowledge)):
            sums[place] += value.item()
    assert loss.keys() == squares.keys()
    for kind, (error, update, knowledge) in squares.items():
        assert loss[kind]["update"] == pytest.approx(1 - error / update, abs=1e-4)
        expected = max(0.0, 1 - error / knowledge) if knowledge else None
        assert loss[kind]["knowledge"] == (expected if expected is None else pytest.approx(expected, abs=1e-4))
    lost = loss["layers.*.mlp.up_proj.weight"]
    assert 0.5 < lost["knowledge"] < 0.9999
    assert loss["norm.weight"] == {"update": 1.0, "knowledge": None}


def test_float32_loses_nothing(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path / "pre")
    made = Readapter(Checkpoint(pretrained), Checkpoint(factories.full_retriever(tmp_path / "ret", pretrained)))
    plan = plan_shards(made, dtype="float32", max_shard_bytes=1 << 30)
    loss = write_weights(made, Scales(0.7, ()), plan, Location(str(tmp_path / "out")), report=lambda done: None)
    assert {shares["update"] for shares in loss.survives().values()} == {1.0}
    assert CastLoss.from_json(loss.to_json()) == loss
