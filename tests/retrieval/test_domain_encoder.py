import json
from collections import OrderedDict

import numpy as np
import pytest
import torch

from readapt_ray.catalog.models import open_model
from readapt_ray.catalog.retrievers import TARGETS_BY_FAMILY
from readapt_ray.errors import FingerprintMismatchError, InputError, ModelError, WeightMismatchError
from readapt_ray.retrieval import domain_encoder
from readapt_ray.retrieval.domain_encoder import DomainEncoder
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.stages.merge import MergeConfig, merge
from readapt_ray.weights.domain_layers import DomainUse
from readapt_ray.weights.domain_sources import check_domains, fetched_adapters, read_domains
from tests import factories, families
from tests.families import FAMILIES, Family
from tests.retrieval.devices import OnCuda

LEAST_COSINE = {"float32": 0.99999, "bfloat16": 0.999}
DEBERTA = Family(
    "deberta-v2",
    {
        "pad_token_id": 0,
        "relative_attention": True,
        "share_att_key": True,
        "position_buckets": 16,
        "pos_att_type": ["p2c", "c2p"],
        "type_vocab_size": 0,
    },
)


def _pair(folder, family, kind):
    base = families.pretrained(folder / "base", family)
    if kind == "full":
        return base, families.retriever(folder / "retriever", base, family)
    retriever = factories.lora_adapter(
        folder / "retriever", base, headless=True, targets=TARGETS_BY_FAMILY[family.model_type]
    )
    return base, factories.write_contract(retriever, pooling=family.pooling.replace("lasttoken", "last"))


def _adapter(folder, base, family, seed, **options):
    make = factories.dora_adapter if seed % 2 else factories.lora_adapter
    return make(folder, base, seed=seed, headless=True, targets=TARGETS_BY_FAMILY[family.model_type], **options)


def _merged(output, base, retriever, *adapters, scale=0.5, **options):
    adapter = tuple(map(str, adapters))
    merge(
        MergeConfig(
            pretrained=str(base),
            retriever=str(retriever),
            adapter=adapter,
            knowledge_scale=scale,
            output=str(output),
            **options,
        )
    )
    return output


def _open(folders, base, *, dtype="float32", max_bytes=1 << 30, packed=True, gpu_share=1.0):
    records = read_domains({folder.name: str(folder) for folder in folders})
    encoder = DomainEncoder(
        open_model(str(folders[0])),
        open_model(str(base)),
        retriever_fingerprint=records[0].retriever_fingerprint,
        dtype=dtype,
        max_bytes=max_bytes,
        packed=packed,
        gpu_share=gpu_share,
    )
    return encoder, [each.source for each in records]


def _load(encoder, source):
    with fetched_adapters(source, encoder.base) as adapters:
        for _ in encoder.load(source, adapters):
            pass
    return encoder.find(source)


def _cosines(one, other):
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A base, a retriever of full weights and four domains of it."""
    folder = tmp_path_factory.mktemp("decoder")
    family = FAMILIES["stella"]
    base, retriever = _pair(folder, family, "full")
    domains = []
    for seed in range(4):
        adapter = _adapter(folder / f"adapter-{seed}", base, family, seed)
        domains.append(_merged(folder / f"domain-{seed}", base, retriever, adapter, factors=True))
    return base, retriever, domains


def test_a_batch_on_a_gpu_leaves_room_for_the_factors_of_domains(decoder, monkeypatch):
    base, _, domains = decoder
    monkeypatch.setattr(domain_encoder, "Encoder", OnCuda)
    total = 4 * 10**9
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (total, total))
    plain, _ = _open(domains[:1], base, max_bytes=1)
    assert plain.encoder.batch_tokens == 131_072
    full, _ = _open(domains[:1], base, max_bytes=int(0.94 * total) - (1 << 30) - 10**7)
    assert 1024 <= full.encoder.batch_tokens < 10_000
    half, _ = _open(domains[:1], base, max_bytes=int(0.47 * total) - (1 << 30) - 10**7, gpu_share=0.5)
    assert half.encoder.batch_tokens == full.encoder.batch_tokens


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_texts_of_domains_in_one_batch_get_the_vectors_of_the_merged_models(tmp_path, name, kind):
    family = FAMILIES[name]
    base, retriever = _pair(tmp_path, family, kind)
    adapters = [_adapter(tmp_path / f"adapter-{seed}", base, family, seed) for seed in (2, 3)]
    groups = [adapters[:1], adapters[1:], adapters]  # LoRA, DoRA, both at once
    layers = [(), ("0=2.0", "1=0.0"), ("1=-1.0",)]
    domains = [
        _merged(tmp_path / f"domain-{number}", base, retriever, *group, factors=True, layer_scales=layers[number])
        for number, group in enumerate(groups)
    ]
    models = [
        _merged(tmp_path / f"model-{number}", base, retriever, *group, dtype="float32", layer_scales=layers[number])
        for number, group in enumerate(groups)
    ]
    for dtype, packed in (("float32", True), ("float32", False), ("bfloat16", True)):
        encoder, sources = _open(domains, base, dtype=dtype, packed=packed)
        uses = [DomainUse(_load(encoder, source), source.scales) for source in sources]
        texts = [each.text for each in factories.small_corpus(12)]
        rows = encoder.encoder.tokenize([text[: 20 + 9 * place] for place, text in enumerate(texts)], "passage")
        found = encoder.encoder.encode_ids(rows, [uses[place % 3] for place in range(12)])
        for number, model in enumerate(models):
            merged = Encoder.load(open_model(str(model)), dtype=dtype, packed=False)
            cosines = _cosines(found[number::3], merged.encode_ids(rows[number::3]))
            assert cosines.min() >= LEAST_COSINE[dtype], (dtype, packed, number)


def test_a_scale_of_zero_gives_the_retriever_and_scales_can_differ_in_one_batch(tmp_path, decoder):
    base, retriever, domains = decoder
    encoder, sources = _open(domains, base)
    domain = _load(encoder, sources[1])
    (row,) = encoder.encoder.tokenize(["the lock of a thread"], "passage")
    found = encoder.encoder.encode_ids([row] * 4, [DomainUse(domain, (scale,)) for scale in (0.0, 0.25, 1.0)] + [None])
    plain = Encoder.load(open_model(str(retriever)), packed=False).encode_ids([row])
    np.testing.assert_allclose(found[[0, 3]], plain.repeat(2, axis=0), atol=1e-6)
    adapter = domains[1] / "knowledge-1"
    for place, scale in ((1, 0.25), (2, 1.0)):
        model = _merged(tmp_path / f"model-{scale}", base, retriever, adapter, scale=scale)
        assert _cosines(found[[place]], Encoder.load(open_model(str(model))).encode_ids([row]))[0] > 0.99999


def test_a_text_in_two_domains_is_encoded_twice(decoder):
    base, _, domains = decoder
    encoder, sources = _open(domains, base)
    one, other = (DomainUse(_load(encoder, source), (0.5,)) for source in sources[:2])
    row = [1, 5, 9, 2]
    found = encoder.encoder.encode_ids([row, row, row], [one, other, one])
    assert np.array_equal(found[0], found[2])
    assert not np.allclose(found[0], found[1], atol=1e-3)


def test_an_architecture_that_shares_a_layer_among_texts_is_refused_by_name(tmp_path):
    base, retriever = _pair(tmp_path, DEBERTA, "full")
    adapter = _adapter(tmp_path / "adapter", base, DEBERTA, 3)
    domain = _merged(tmp_path / "domain", base, retriever, adapter, factors=True)
    encoder, (source,) = _open([domain], base)
    before = encoder.encoder.encode_ids([[1, 5, 9]])
    with pytest.raises(ModelError, match=r"(query|key)_proj.weight is multiplied with 32 rows .* merge this domain"):
        _load(encoder, source)
    assert np.array_equal(encoder.encoder.encode_ids([[1, 5, 9]]), before)
    assert not [each for each in encoder.network.module.modules() if type(each).__name__ == "DomainLinear"]


def test_domains_that_were_not_used_for_long_make_room(decoder):
    base, _, domains = decoder
    encoder, sources = _open(domains, base)
    sizes = [_load(encoder, source).num_bytes for source in sources]
    assert encoder.num_bytes == sum(sizes)
    encoder, _ = _open(domains, base, max_bytes=sizes[0] + sizes[1] + 1)
    _load(encoder, sources[0]), _load(encoder, sources[1])
    assert encoder.find(sources[0])
    _load(encoder, sources[2])
    assert [encoder.find(source) is not None for source in sources] == [True, False, True, False]
    encoder, _ = _open(domains, base, max_bytes=sizes[0] - 1)
    with pytest.raises(InputError, match=r"domain-0.*bytes.*--max-domain-bytes"):
        _load(encoder, sources[0])


class UsedMeanwhile(OrderedDict):
    """Domains of which another thread uses the oldest whenever one is added, or takes one away while it is asked for."""

    takes = False

    def __setitem__(self, name, domain):
        super().__setitem__(name, domain)
        if len(self) > 1:
            self.move_to_end(next(iter(self)))

    def get(self, name, default=None):
        found = super().get(name, default)
        if self.takes:
            self.pop(name, None)
        return found


def test_domains_that_another_thread_uses_meanwhile_break_nothing(decoder):
    base, _, domains = decoder
    encoder, sources = _open(domains, base)
    sizes = [_load(encoder, source).num_bytes for source in sources]
    encoder, _ = _open(domains, base, max_bytes=sizes[0] + sizes[1] - 1)
    encoder._domains = UsedMeanwhile()
    assert _load(encoder, sources[0]) is not None
    assert _load(encoder, sources[1]) is not None
    assert encoder.num_bytes == sizes[1]
    encoder._domains.takes = True
    assert encoder.find(sources[1]) is not None
    assert encoder.find(sources[1]) is None


def test_factors_take_no_more_memory_than_their_files(decoder):
    base, _, domains = decoder
    encoder, sources = _open(domains, base)
    for source, domain in zip(sources, domains, strict=True):
        tensors = factories.load_file(domain / "knowledge-1/adapter_model.safetensors")
        assert _load(encoder, source).num_bytes <= 1.1 * sum(each.nbytes for each in tensors.values())


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.nan, "'bundle/1' holds NaN or infinity"), (3e38, "in domain 'bundle' give NaN or infinity")],
)
def test_a_domain_of_nan_fails_alone(tmp_path, decoder, value, message):
    base, retriever, domains = decoder
    tensors = factories.load_file(domains[1] / "knowledge-1/adapter_model.safetensors")
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = value
    broken = tmp_path / "broken"
    factories.dora_adapter(broken, base, headless=True, targets=TARGETS_BY_FAMILY["qwen2"])
    bundle = _merged(tmp_path / "bundle", base, retriever, broken, factors=True)
    factories.save_file(tensors, bundle / "knowledge-1/adapter_model.safetensors")
    encoder, (good, bad) = _open([domains[0], bundle], base)
    use = DomainUse(_load(encoder, good), good.scales)
    before = encoder.encoder.encode_ids([[1, 5, 9]], [use])
    with pytest.raises(ModelError, match=message):
        _load(encoder, bad)
    assert np.array_equal(encoder.encoder.encode_ids([[1, 5, 9]], [use]), before)


def test_factors_that_are_gone_or_replaced_are_named(tmp_path, decoder):
    base, retriever, domains = decoder
    bundle = _merged(tmp_path / "bundle", base, retriever, domains[0] / "knowledge-1", factors=True)
    encoder, (source,) = _open([bundle], base)
    (bundle / "manifest.json").unlink()
    with pytest.raises(FingerprintMismatchError, match="domain 'bundle' are gone, or have been replaced"):
        _load(encoder, source)
    with pytest.raises(ModelError, match=r"domain 'bundle': .* is not a finished output"):
        read_domains({"bundle": str(bundle)})


def test_knowledge_of_whole_weights_is_refused(tmp_path, decoder):
    base, retriever, _ = decoder
    tuned = factories.full_retriever(tmp_path / "tuned", base, headless=False)
    encoder, (source,) = _open([_merged(tmp_path / "bundle", base, retriever, tuned, factors=True)], base)
    with pytest.raises(ModelError, match="keeps its knowledge as whole weights"):
        _load(encoder, source)


def test_domains_of_another_base_or_retriever_are_refused_by_name(tmp_path, decoder):
    base, retriever, domains = decoder
    adapter = domains[0] / "knowledge-1"
    records = read_domains({"first": str(domains[0]), "second": str(domains[1])})
    check_domains(records, open_model(str(base)))
    with pytest.raises(WeightMismatchError, match=r"domain 'first' was made of .*base.*serve that base"):
        check_domains(records, open_model(str(retriever)))

    def refused(other, **options):
        made = _merged(tmp_path / str(len(list(tmp_path.iterdir()))), base, other, adapter, factors=True, **options)
        records = read_domains({"first": str(domains[0]), "other": str(made)})
        with pytest.raises(WeightMismatchError, match="domains 'first' and 'other' cannot share an encoder") as caught:
            check_domains(records, open_model(str(base)))
        return str(caught.value)

    assert "have other weights" in refused(families.retriever(tmp_path / "other", base, FAMILIES["stella"], seed=9))
    assert "readapter_scale is 1.0 for one and 0.5" in refused(retriever, readapter_scale=0.5)
    reworded = tmp_path / "reworded"
    families.retriever(reworded, base, FAMILIES["stella"])
    config = json.loads((reworded / "tokenizer_config.json").read_text())
    (reworded / "tokenizer_config.json").write_text(json.dumps(config | {"note": "other"}))
    assert "have other tokenizers" in refused(reworded)
