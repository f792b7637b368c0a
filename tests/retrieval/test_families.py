"""The families of models that retrievers are made of: encoded as sentence-transformers does, trained, merged, exported."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from readapt_ray.catalog import models, retrievers, shapes
from readapt_ray.retrieval.encoder import Encoder
from tests import factories, families
from tests.families import FAMILIES, Family

TEXTS = [each.text for each in factories.small_corpus(9)] + ["a", "read the file", "x" + " lock" * 30]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes the pretrained model and the retriever of a family, once."""
    folders: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Family, Path, Path]:
        family = FAMILIES[name]
        if name not in folders:
            root = tmp_path_factory.mktemp(name)
            base = families.pretrained(root / "base", family)
            folders[name] = base, families.retriever(root / "retriever", base, family)
        return family, *folders[name]

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_are_those_of_sentence_transformers_packed_or_padded(made, name):
    _, _, folder = made(name)
    model = models.open_model(str(folder))
    due = families.by_sentence_transformers(folder, TEXTS)
    for packed in (False, True):
        encoder = Encoder.load(model, device="cpu", packed=packed, batch_tokens=100)
        assert encoder.is_packed == (packed and name != "mpnet"), "MPNet's attention cannot be exchanged"
        vectors = encoder.encode(TEXTS, "passage")
        assert vectors.shape == due.shape == (len(TEXTS), encoder.dimension)
        assert np.abs(vectors - due).max() < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_do_not_depend_on_the_batch(made, name):
    _, _, folder = made(name)
    model = models.open_model(str(folder))
    texts = [each.text for each in factories.small_corpus(30)]
    for packed in (False, True):
        few, many = (
            Encoder.load(model, device="cpu", packed=packed, batch_tokens=tokens).encode(texts, "passage")
            for tokens in (256, 4096)
        )
        assert np.abs(few - many).max() < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_that_are_trained_are_known(made, name):
    family, base, _ = made(name)
    shape = shapes.model_shape(str(base), "causal_lm" if family.is_decoder else "masked_lm")
    targets = retrievers.target_modules(family.model_type)
    layers = shapes.matching_layers([path for path, _, _ in shape.linears], targets)
    assert len(layers) >= 3 * shape.num_layers
    assert not any("head" in path or "decoder" in path for path in layers)
    assert shape.is_causal == (name in ("gemma3", "stella"))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_that_of_transformers_on_padded_rows(made, name):
    from readapt_ray.training import objectives, packing, trainable
    from readapt_ray.training.packing import Block, Masking

    family, base, _ = made(name)
    objective = "causal_lm" if family.is_decoder else "masked_lm"
    model = trainable.load_for_training(
        models.open_model(str(base)), objective=objective, dtype=torch.float32, device=torch.device("cpu"), zero_stage=0
    ).eval()
    ids = [families.tokenizer(family)(text)["input_ids"] for text in TEXTS[:4]]
    blocks = [Block(np.array(row, np.int32), (len(row),), (number,)) for number, row in enumerate(ids)]
    masking = None if family.is_decoder else Masking(mask_id=4, vocab_size=384, seed=1)
    batch = packing.collate(blocks, pad_id=0, masking=masking)
    loss = objectives.loss_sum(model, batch)
    plain = getattr(transformers, family.head).from_pretrained(base).eval()
    due = 0.0
    for start, end in zip(batch.passage_ends[:-1], batch.passage_ends[1:], strict=True):
        logits = plain(input_ids=batch.input_ids[:, start:end]).logits[0]
        labels = batch.labels[0, start:end]
        due += torch.nn.functional.cross_entropy(logits, labels, ignore_index=packing.IGNORED, reduction="sum").item()
    assert loss.item() == pytest.approx(due, rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_merged_model_opens_in_sentence_transformers(made, name, tmp_path):
    """Its weights are the sum of the parts as PEFT and transformers know them."""
    import peft

    from readapt_ray.stages.merge import MergeConfig, merge

    family, base, folder = made(name)
    targets = retrievers.target_modules(family.model_type)
    adapter = factories.dora_adapter(tmp_path / "adapter", base, targets=targets)
    merge(
        MergeConfig(pretrained=str(base), retriever=str(folder), adapter=str(adapter), output=str(tmp_path / "merged"))
    )
    before, after = (transformers.AutoModel.from_pretrained(each).state_dict() for each in (base, folder))
    tuned = peft.PeftModel.from_pretrained(getattr(transformers, family.head).from_pretrained(base), str(adapter))
    tuned = tuned.merge_and_unload().base_model.state_dict()
    written = transformers.AutoModel.from_pretrained(tmp_path / "merged").state_dict()
    for key, weight in written.items():
        if "pooler" not in key:
            due = after[key] + 0.5 * (tuned[key] - before[key])
            assert torch.allclose(weight, due, atol=1e-6), key
    vectors = Encoder.load(models.open_model(str(tmp_path / "merged")), device="cpu").encode(TEXTS, "passage")
    assert np.abs(vectors - families.by_sentence_transformers(tmp_path / "merged", TEXTS)).max() < 1e-6
    changed = np.abs(vectors - families.by_sentence_transformers(folder, TEXTS)).max()
    assert changed > 1e-3


def test_dense_layers_stand_in_a_bundle_too(made, tmp_path):
    from readapt_ray.stages.merge import MergeConfig, merge

    _, base, folder = made("stella")
    adapter = factories.dora_adapter(tmp_path / "adapter", base)
    parts = {"pretrained": str(base), "retriever": str(folder), "adapter": str(adapter)}
    merge(MergeConfig(**parts, output=str(tmp_path / "merged")))
    merge(MergeConfig(**parts, factors=True, output=str(tmp_path / "bundle")))
    merge(MergeConfig(bundle=str(tmp_path / "bundle"), output=str(tmp_path / "again")))
    one, other = (
        Encoder.load(models.open_model(str(tmp_path / name)), device="cpu").encode(TEXTS, "passage")
        for name in ("merged", "again")
    )
    assert one.shape == (len(TEXTS), 24)
    assert np.abs(one - other).max() < 1e-6


def test_fewer_dimensions_are_the_first_behind_the_dense_layers(made):
    _, _, folder = made("labse")
    model = models.open_model(str(folder))
    encoding = model.encoding.model_copy(update={"dimensions": 8})
    vectors = Encoder.load(model, encoding=encoding, device="cpu").encode(TEXTS, "passage")
    whole = families.by_sentence_transformers(folder, TEXTS)[:, :8]
    assert np.abs(vectors - whole / np.linalg.norm(whole, axis=1, keepdims=True)).max() < 1e-6
