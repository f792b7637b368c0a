import itertools
import json
import math
import re

import pytest
import torch

from readapt_ray.errors import InputError, ModelError, WeightMismatchError
from readapt_ray.weights import merging as readapter_module
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.deltas import Difference, Whole
from readapt_ray.weights.merging import Readapter, Scales, TensorTerms, open_retriever
from readapt_ray.weights.reference import readapted_weight
from readapt_ray.weights.scale_options import layer_scales
from readapt_ray.weights.weight_files import Checkpoint
from tests import factories
from tests.weights import oracles

CASES = [
    *itertools.product(("decoder", "encoder"), ("full", "lora"), ("tied", "untied"), (1, 3)),
    ("decoder", "dora", "tied", 1),
]


class Trio:
    """A pretrained model, a retriever and a knowledge adapter on disk, and what they are in float64."""

    def __init__(self, root, kind, retriever, tied, shards):
        if kind == "decoder":
            self.pretrained = factories.tiny_decoder(root / "pre", tie_word_embeddings=tied == "tied", shards=shards)
        else:
            self.pretrained = factories.tiny_encoder(root / "pre", shards=shards)
            if tied == "untied":
                _untie(self.pretrained, shards)
        if retriever == "full":
            self.retriever = factories.full_retriever(root / "ret", self.pretrained, shards=shards)
        else:
            use_dora = retriever == "dora"
            self.retriever = factories.lora_adapter(root / "ret", self.pretrained, headless=True, use_dora=use_dora)
        self.adapter = factories.dora_adapter(root / "ad", self.pretrained)
        before = Checkpoint(self.pretrained)
        after = open_retriever(self.retriever, before)
        self.readapter = Readapter(before, after, [Adapter(self.adapter, before)])
        self.p64 = oracles.as_float64(self.pretrained)
        merged = oracles.merged_by_peft(self.pretrained, self.adapter)
        self.t64 = {name: merged[name] for name in self.p64}
        if retriever == "full":
            self.r64 = oracles.as_float64(self.retriever)
        else:
            laid = oracles.merged_by_peft(self.pretrained, self.retriever, headless=True)
            self.r64 = {name: laid[name] for name in self.p64}


def _untie(folder, shards):
    """Give the masked-language head of an encoder a matrix of its own."""
    tensors = factories.read_tensors(folder)
    tensors["cls.predictions.decoder.weight"] = torch.randn(384, 32)
    factories.write_tensors(folder, tensors, shards=shards)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def trio(request, tmp_path_factory):
    return Trio(tmp_path_factory.mktemp("trio"), *request.param)


def _made(trio, readapter_scale, knowledge_scale):
    return dict(trio.readapter.walk(Scales(readapter_scale, (knowledge_scale,))))


def test_no_share_of_anything_is_the_pretrained_model_bit_for_bit(trio):
    made = _made(trio, 0.0, 0.0)
    assert made.keys() == trio.p64.keys()
    for name, tensor in made.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, trio.p64[name].float())


def test_the_whole_readapter_alone_is_the_retriever(trio):
    made = _made(trio, 1.0, 0.0)
    for name, tensor in made.items():
        if isinstance(trio.readapter.retriever, Checkpoint):
            assert torch.equal(tensor, trio.r64[name].float())
        else:
            assert (tensor.double() - trio.r64[name]).abs().max() < 1e-6 * trio.r64[name].abs().max()


@pytest.mark.parametrize(("a", "k"), [(1.0, 0.5), (0.0, 1.0), (0.7, 0.3), (1.0, 1.0), (-0.5, 2.0)])
def test_any_scales_match_float64_from_pefts_own_merges(trio, a, k):
    made = _made(trio, a, k)
    for name, tensor in made.items():
        p, r, t = trio.p64[name], trio.r64[name], trio.t64[name]
        wanted = readapted_weight(name, p, r, t - p, readapter_scale=a, knowledge_scale=k)
        assert (tensor.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max(), name
        rounding = 2**-8 * wanted.abs() + 1e-6 * wanted.abs().max()
        assert ((tensor.bfloat16().double() - wanted).abs() <= rounding).all(), name


@pytest.mark.parametrize("layers", ["0=0.8,1=0.2", "1=0", "0-1=-0.5"])
def test_the_knowledge_scale_may_differ_by_layer(trio, layers):
    factors = {0: 1.0, 1: 1.0} | {"0=0.8,1=0.2": {0: 0.8, 1: 0.2}, "1=0": {1: 0.0}}.get(layers, {0: -0.5, 1: -0.5})
    scales = Scales(0.7, (0.5,), layer_scales(layers.split(",")))
    seen = set()
    for name, tensor in trio.readapter.walk(scales):
        layer = re.search(r"layers?\.(\d+)\.", name)
        factor = factors[int(layer[1])] if layer else 1.0
        seen.add(factor)
        p, r, t = trio.p64[name], trio.r64[name], trio.t64[name]
        wanted = readapted_weight(name, p, r, t - p, readapter_scale=0.7, knowledge_scale=0.5 * factor)
        assert (tensor.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max(), name
    assert seen == {1.0, *factors.values()}


def test_linear_in_each_scale(trio):
    for axis in range(2):
        zero, half, one = (_made(trio, *(x if axis == 0 else 0.6, x if axis == 1 else 0.4)) for x in (0.0, 0.5, 1.0))
        for name in zero:
            assert torch.allclose(half[name], (zero[name] + one[name]) / 2, rtol=0, atol=5e-7), name
        assert any((one[name] - zero[name]).abs().max() > 1e-2 for name in zero)


def test_slices_do_not_change_what_comes_out(trio, monkeypatch):
    whole = _made(trio, 0.7, 0.3)
    monkeypatch.setattr(readapter_module, "_SLICE_ELEMENTS", 300)
    assert max(len(list(trio.readapter.slices(name))) for name in whole) > 5
    for name, tensor in _made(trio, 0.7, 0.3).items():
        assert torch.allclose(tensor, whole[name], rtol=0, atol=1e-7)


def test_two_knowledge_adapters_add_up(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path / "pre")
    folders = [factories.dora_adapter(tmp_path / f"ad{seed}", pretrained, seed=seed) for seed in (3, 4)]
    before = Checkpoint(pretrained)
    after = Checkpoint(factories.full_retriever(tmp_path / "ret", pretrained))
    both = Readapter(before, after, [Adapter(folder, before) for folder in folders])
    p, r = oracles.as_float64(pretrained), oracles.as_float64(after.folder)
    tuned = [oracles.merged_by_peft(pretrained, folder) for folder in folders]
    for name, tensor in both.walk(Scales(1.0, (0.5, 0.25))):
        wanted = r[name] + 0.5 * (tuned[0][name] - p[name]) + 0.25 * (tuned[1][name] - p[name])
        assert (tensor.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize(("before", "after"), itertools.product(["float32", "float16", "bfloat16"], repeat=2))
def test_mixed_types_are_subtracted_in_float32(tmp_path, before, after):
    pretrained = factories.tiny_decoder(tmp_path / "pre", dtype=before)
    retriever = factories.full_retriever(tmp_path / "ret", pretrained, dtype=after, scale=1e-3)
    made = Readapter(Checkpoint(pretrained), Checkpoint(retriever))
    p, r = oracles.as_float64(pretrained), oracles.as_float64(retriever)
    for name, tensor in made.walk(Scales(0.5, ())):
        assert made.dtype(name) == getattr(torch, after)
        assert (tensor.double() - (p[name] + r[name]) / 2).abs().max() <= 1e-7 * p[name].abs().max()


def _by_hand(p, r, u, a, k):
    terms = (Whole(rows=r), Difference(rows=u))
    return TensorTerms(name="w", pretrained_rows=p, terms=terms).rows(Scales(a, (k,)))


def test_one_weight_by_hand():
    p, r, u = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]]), torch.tensor([[0.5, -1.0]])
    rows = _by_hand(p, r, u, 0.5, 2.0)
    assert rows.readapted.tolist() == [[3.0, 0.0]]
    assert rows.retrieval.tolist() == [[2.0, 2.0]]
    assert rows.pretrained.tolist() == [[1.0, 2.0]]
    with pytest.raises(WeightMismatchError, match="'w' has the shapes"):
        _by_hand(p, r[:, :1], u, 1, 1)


def test_inputs_are_left_alone():
    p, r, u = (torch.full((2, 2), float(number)) for number in (1, 2, 3))
    for a, k in itertools.product((0.0, 0.5, 1.0), repeat=2):
        _by_hand(p, r, u, a, k)
    assert [each[0, 0].item() for each in (p, r, u)] == [1, 2, 3]


def _change(folder, change):
    tensors = factories.read_tensors(folder)
    change(tensors)
    factories.write_tensors(folder, tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("norm.weight"), r"norm\.weight: only in 'before'"),
        (lambda tensors: tensors.update(more=torch.ones(2)), r"more: only in 'after'"),
        (
            lambda tensors: tensors.update({"embed_tokens.weight": torch.zeros(383, 32)}),
            r"embed_tokens\.weight: \[384, 32\] before, \[383, 32\] after",
        ),
    ],
)
def test_what_has_no_partner_is_refused_by_name(tmp_path, change, said):
    pretrained = factories.tiny_decoder(tmp_path / "pre")
    retriever = factories.full_retriever(tmp_path / "ret", pretrained)
    _change(retriever, change)
    with pytest.raises(WeightMismatchError, match=said):
        Readapter(Checkpoint(pretrained, name="before"), Checkpoint(retriever, name="after"))


def test_an_embedding_that_is_stored_only_as_the_head_is_refused(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path / "pre")

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    _change(pretrained, rename)
    with pytest.raises(ModelError, match=r"holds a head \(lm_head\.weight\) but no word embeddings"):
        Readapter(Checkpoint(pretrained), Checkpoint(pretrained))


def _add_token(folder):
    tokenizer = factories.decoder_tokenizer()
    tokenizer.add_tokens(["<query>"])
    tokenizer.save_pretrained(folder)


def test_rows_that_no_token_has_are_padding(tmp_path, caplog):
    """On either side; those of the retriever are kept."""
    caplog.set_level("INFO", "readapt_ray")
    plain = factories.tiny_decoder(tmp_path / "plain", headless=True)
    padded = factories.full_retriever(tmp_path / "padded", plain)
    zeros = torch.zeros(64, 32)
    _change(padded, lambda t: t.update({"embed_tokens.weight": torch.cat([t["embed_tokens.weight"], zeros])}))
    one, other = Checkpoint(plain), Checkpoint(padded)
    words = [each.read("embed_tokens.weight") for each in (one, other)]
    made = Readapter(one, other).weight("embed_tokens.weight", Scales(0.5, ()))
    assert torch.equal(made[384:], zeros)
    assert torch.allclose(made[:384], (words[0] + words[1][:384]) / 2, atol=1e-7)
    made = Readapter(other, one).weight("embed_tokens.weight", Scales(0.5, ()))
    assert torch.allclose(made, (words[0] + words[1][:384]) / 2, atol=1e-7)
    assert "no token has one of the rows from 384 on, so they are padding" in caplog.text
    for file in [*plain.glob("token*"), *padded.glob("token*")]:
        file.unlink()
    with pytest.raises(WeightMismatchError, match="--accept vocabulary"):
        Readapter(one, other)


def test_words_that_only_the_retriever_has_are_kept_as_they_are(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path / "pre", headless=True)
    retriever = factories.full_retriever(tmp_path / "ret", pretrained)
    new = torch.randn(6, 32)
    _change(retriever, lambda t: t.update({"embed_tokens.weight": torch.cat([t["embed_tokens.weight"], new])}))
    _add_token(retriever)
    before, after = Checkpoint(pretrained), Checkpoint(retriever)
    with pytest.raises(WeightMismatchError, match=r"vocabulary sizes.*differ.*--accept vocabulary"):
        Readapter(before, after)
    made = Readapter(before, after, accept_vocabulary=True)
    for scale in (0.0, 0.5, 1.0):
        rows = made.weight("embed_tokens.weight", Scales(scale, ()))
        p, r = before.read("embed_tokens.weight"), after.read("embed_tokens.weight")
        assert torch.equal(rows[384:], new)
        assert torch.allclose(rows[:384], p + scale * (r[:384] - p), rtol=0, atol=1e-7)


def test_words_that_the_retriever_lacks_are_dropped(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path / "pre", headless=True)
    retriever = factories.full_retriever(tmp_path / "ret", pretrained)
    _change(retriever, lambda t: t.update({"embed_tokens.weight": t["embed_tokens.weight"][:380].clone()}))
    made = Readapter(Checkpoint(pretrained), Checkpoint(retriever), accept_vocabulary=True)
    assert made.shape("embed_tokens.weight") == (380, 32)
    rows = made.weight("embed_tokens.weight", Scales(0.0, ()))
    assert torch.equal(rows, Checkpoint(pretrained).read("embed_tokens.weight")[:380])


def test_all_differences_are_counted(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path / "pre")
    other = factories.tiny_decoder(tmp_path / "other", hidden_size=64)
    with pytest.raises(WeightMismatchError, match="and 10 more"):
        Readapter(Checkpoint(pretrained), Checkpoint(other))


def test_a_head_on_one_side_is_left_out_and_said(tmp_path, caplog):
    pretrained = factories.tiny_decoder(tmp_path / "pre", tie_word_embeddings=False)
    retriever = factories.full_retriever(tmp_path / "ret", pretrained)
    with caplog.at_level("INFO", logger="readapt_ray"):
        made = Readapter(Checkpoint(pretrained, name="before"), Checkpoint(retriever))
    assert made.dropped == ("before: lm_head.weight",)
    assert "lm_head.weight" in caplog.text
    assert "lm_head.weight" not in made.names()


@pytest.mark.parametrize("side", ["pre", "ret"])
def test_a_pooler_on_one_side_is_kept_as_it_is(tmp_path, side):
    pretrained = factories.tiny_encoder(tmp_path / "pre", headless=True)
    factories.full_retriever(tmp_path / "ret", pretrained)
    pooler = torch.randn(32, 32)
    _change(tmp_path / side, lambda tensors: tensors.update({"pooler.dense.weight": pooler}))
    made = Readapter(Checkpoint(tmp_path / "pre"), Checkpoint(tmp_path / "ret"))
    assert made.carried == ("pooler.dense.weight",)
    for scales in ((0.0, ()), (1.0, ()), (0.3, ())):
        assert torch.equal(made.weight("pooler.dense.weight", Scales(*scales)), pooler)


def test_quantised_weights_are_refused(tmp_path):
    pretrained = factories.tiny_decoder(tmp_path)
    _change(pretrained, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=r"quantised.*norm\.weight"):
        Readapter(Checkpoint(pretrained), Checkpoint(pretrained))


@pytest.mark.parametrize("side", ["pre", "ret"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_nan_is_refused_by_name_whatever_the_scales(tmp_path, side, value):
    pretrained = factories.tiny_decoder(tmp_path / "pre", headless=True)
    factories.full_retriever(tmp_path / "ret", pretrained)
    _change(tmp_path / side, lambda tensors: tensors["layers.1.mlp.up_proj.weight"][2, 3].fill_(value))
    made = Readapter(Checkpoint(tmp_path / "pre", name="pre"), Checkpoint(tmp_path / "ret", name="ret"))
    for scales in (Scales(1.0, ()), Scales(0.0, ())):
        with pytest.raises(ModelError, match=rf"layers\.1\.mlp\.up_proj\.weight' of '{side}'"):
            dict(made.walk(scales))


@pytest.mark.parametrize("scales", [(math.nan, (0.5,)), (1.0, (math.inf,))])
def test_scales_are_finite(scales):
    with pytest.raises(InputError, match="not a finite number"):
        Scales(*scales)
