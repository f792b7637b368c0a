import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import open_model
from readapt_ray.errors import InputError, ModelError
from readapt_ray.storage import Location
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.export import plan_shards, write_weights
from readapt_ray.weights.merging import Readapter, Scales
from readapt_ray.weights.model_card import model_card
from readapt_ray.weights.model_files import headless_config, prompts, write_model_files
from readapt_ray.weights.tokenizer import edge_tokens, write_tokenizer
from readapt_ray.weights.weight_files import Checkpoint
from tests import factories


def _same(folder):
    return Readapter(Checkpoint(folder), Checkpoint(folder))


def _write(made, folder, scales=(0.0, ()), *, dtype="retriever", max_shard_bytes=1 << 30):
    plan = plan_shards(made, dtype=dtype, max_shard_bytes=max_shard_bytes)
    seen = []
    write_weights(made, Scales(*scales), plan, Location(str(folder)), report=seen.append)
    assert seen[-1] == plan.num_bytes
    assert seen == sorted(seen)
    return plan


@pytest.mark.parametrize("max_shard_bytes", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "retriever"])
def test_shards_hold_every_tensor_once_within_the_bound(tmp_path, dtype, max_shard_bytes):
    source = factories.tiny_decoder(tmp_path / "in", headless=True, dtype="bfloat16")
    plan = _write(_same(source), tmp_path / "out", dtype=dtype, max_shard_bytes=max_shard_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == len(plan.shards)
    assert [file.name for file in files] == [shard.file_name for shard in plan.shards]
    wanted, read = factories.read_tensors(source), {}
    for file in files:
        tensors = load_file(file)
        assert not tensors.keys() & read.keys()
        assert len(tensors) == 1 or sum(each.nbytes for each in tensors.values()) <= max_shard_bytes
        read |= tensors
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(read[name], tensor.to(getattr(torch, dtype, torch.bfloat16)))
    assert Checkpoint(tmp_path / "out").names() == Checkpoint(source).names()
    assert (tmp_path / "out/model.safetensors.index.json").exists() == (len(files) > 1)


@pytest.mark.parametrize("shards", [1, 4])
def test_the_same_bytes_by_any_number_of_cores(tmp_path, monkeypatch, shards):
    monkeypatch.setattr("readapt_ray.weights.merging._SLICE_ELEMENTS", 1000)
    pretrained = factories.tiny_decoder(tmp_path / "pre", dtype="bfloat16", shards=shards)
    before = Checkpoint(pretrained)
    retriever = Checkpoint(factories.full_retriever(tmp_path / "ret", pretrained, shards=shards))
    made = Readapter(before, retriever, [Adapter(factories.dora_adapter(tmp_path / "ad", pretrained), before)])
    plan = plan_shards(made, dtype="bfloat16", max_shard_bytes=20_000)
    for num_threads in (1, 2, 5):
        target = Location(str(tmp_path / f"out{num_threads}"))
        write_weights(made, Scales(0.9, (0.5,)), plan, target, report=lambda done: None, num_threads=num_threads)
    for file in (tmp_path / "out1").glob("*.safetensors"):
        content = file.read_bytes()
        assert content == (tmp_path / "out2" / file.name).read_bytes()
        assert content == (tmp_path / "out5" / file.name).read_bytes()


def test_the_same_bytes_whatever_the_shards_of_the_inputs(tmp_path):
    for shards in (1, 4):
        source = factories.tiny_decoder(tmp_path / f"in{shards}", shards=shards)
        _write(_same(source), tmp_path / f"out{shards}", max_shard_bytes=20_000)
    for file in (tmp_path / "out1").iterdir():
        assert file.read_bytes() == (tmp_path / "out4" / file.name).read_bytes()


def test_each_tensor_keeps_its_own_type_and_is_aligned(tmp_path):
    source = factories.tiny_decoder(tmp_path / "in", headless=True)
    tensors = factories.read_tensors(source)
    for number, name in enumerate(sorted(tensors)):
        tensors[name] = tensors[name].to([torch.float32, torch.bfloat16][number % 2])
    tensors["an_odd_one"] = torch.ones(3, dtype=torch.bfloat16)
    factories.write_tensors(source, tensors)
    _write(_same(source), tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert {name: each.dtype for name, each in written.items()} == {name: each.dtype for name, each in tensors.items()}
    checkpoint = Checkpoint(tmp_path / "out")
    for name in checkpoint.names():
        assert checkpoint._tensors[name].offset % checkpoint.dtype(name).itemsize == 0


def test_what_float16_cannot_hold_is_refused_by_name(tmp_path):
    source = factories.tiny_decoder(tmp_path / "in")
    tensors = factories.read_tensors(source)
    tensors["model.norm.weight"][0] = 1e6
    factories.write_tensors(source, tensors)
    with pytest.raises(ModelError, match=r"norm\.weight' reaches 1e\+06, beyond float16"):
        _write(_same(source), tmp_path / "out", dtype="float16")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_shard_that_is_there_is_not_written_again(tmp_path):
    made = _same(factories.tiny_decoder(tmp_path / "in"))
    plan = _write(made, tmp_path / "out", max_shard_bytes=20_000)
    kept = tmp_path / "out" / plan.shards[0].file_name
    kept.write_bytes(b"mark")
    (tmp_path / "out" / plan.shards[1].file_name).unlink()
    _write(made, tmp_path / "out", max_shard_bytes=20_000)
    assert kept.read_bytes() == b"mark"
    assert (tmp_path / "out" / plan.shards[1].file_name).is_file()


def _encoding(**changes):
    return Encoding.model_validate({"pooling": "last", "add_bos": True, "add_eos": True} | changes)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_plain_transformers_makes_the_ids_that_the_encoding_asks_for(tmp_path, model_type, bos, eos):
    source = factories.tiny_decoder(tmp_path / "in")
    config = json.loads((source / "config.json").read_text()) | {"model_type": model_type}
    (tmp_path / "out").mkdir()
    for folder in (source, tmp_path / "out"):
        (folder / "config.json").write_text(json.dumps(config))
    tokenizer = open_model(str(source)).tokenizer
    write_tokenizer(tokenizer, _encoding(add_bos=bos, add_eos=eos, max_query_tokens=9), tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    raw = tokenizer("array shape", add_special_tokens=False)["input_ids"]
    assert raw
    assert again("array shape")["input_ids"] == [1] * bos + raw + [2] * eos
    assert again.padding_side == "right"
    assert again.model_max_length == 512
    cut = again("array shape " * 50, truncation=True, max_length=9)["input_ids"]
    assert len(cut) == 9
    assert (cut[0] == 1, cut[-1] == 2) == (bos, eos)


def test_a_class_that_overrides_the_file_is_found_out(tmp_path):
    source = factories.tiny_decoder(tmp_path / "in")
    tokenizer = open_model(str(source)).tokenizer
    config = json.loads((source / "config.json").read_text()) | {"model_type": "qwen2"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="Qwen2Tokenizer overrides"):
        write_tokenizer(tokenizer, _encoding(), source)


def test_options_that_would_override_the_post_processor_are_gone(tmp_path):
    source = factories.tiny_decoder(tmp_path / "in")
    config = json.loads((source / "tokenizer_config.json").read_text()) | {
        "add_bos_token": True,
        "add_eos_token": False,
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text((source / "config.json").read_text())
    write_tokenizer(open_model(str(source)).tokenizer, _encoding(), tmp_path / "out")
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert "add_bos_token" not in written
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"][-1] == 2


def test_a_missing_special_token_is_refused(tmp_path):
    tokenizer = factories.decoder_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ModelError, match="bos_token or cls_token"):
        edge_tokens(tokenizer, _encoding())
    assert edge_tokens(tokenizer, _encoding(add_bos=False)) == (None, "</s>")


def test_the_end_that_a_tokenizer_adds_by_itself_is_kept():
    from tokenizers.processors import TemplateProcessing

    tokenizer = factories.decoder_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <pad>", special_tokens=[("<pad>", 0)])
    assert edge_tokens(tokenizer, _encoding(add_bos=False)) == (None, "<pad>")


def test_several_ends_are_refused_only_where_one_is_asked_for():
    from tokenizers.processors import TemplateProcessing

    tokenizer = factories.decoder_tokenizer()
    specials = [("<pad>", 0), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s> <pad>", special_tokens=specials)
    with pytest.raises(ModelError, match="</s> <pad> on one side"):
        edge_tokens(tokenizer, _encoding())
    assert edge_tokens(tokenizer, _encoding(add_eos=False)) == ("<s>", None)


def test_an_unknown_word_is_not_taken_for_a_special_token():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1, "</s>": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", bos_token="<s>", eos_token="</s>")
    assert edge_tokens(tokenizer, _encoding()) == ("<s>", "</s>")


def test_a_tokenizer_without_padding_gets_one(tmp_path):
    source = factories.tiny_decoder(tmp_path / "in")
    tokenizer = open_model(str(source)).tokenizer
    tokenizer.pad_token = None
    config = json.loads((source / "config.json").read_text()) | {"pad_token_id": None}
    out = Location(str(tmp_path / "out"))
    write_model_files(out, config=config, tokenizer=tokenizer, encoding=_encoding(), contract={})
    assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "</s>"


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_encoding_is_read_back_from_both_contracts(tmp_path, pooling, normalize):
    source = factories.tiny_encoder(tmp_path / "in")
    encoding = _encoding(
        pooling=pooling,
        normalize=normalize,
        query_template="Instruct: {task}\nQuery: {text}",
        passage_template="passage: {title} {text}",
        task="find it",
        max_passage_tokens=100,
        max_query_tokens=100,
        lower_case=True,
    )
    model = open_model(str(source))
    config = headless_config(model.read_json("config.json"), dtype="float32", name="x")
    out = Location(str(tmp_path / "out"))
    write_model_files(out, config=config, tokenizer=model.tokenizer, encoding=encoding, contract={"a": 1})
    assert open_model(str(tmp_path / "out")).encoding == encoding
    (tmp_path / "out/readapt.json").unlink()
    changed = {"query_template": "Instruct: find it\nQuery: {text}", "task": ""}
    assert open_model(str(tmp_path / "out")).encoding == encoding.model_copy(update=changed)


@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_that_are_cut_are_said_to_be_so(tmp_path, caplog, normalize):
    source = factories.tiny_encoder(tmp_path / "in")
    model = open_model(str(source))
    config = headless_config(model.read_json("config.json"), dtype="float32", name="x")
    written = {"config": config, "tokenizer": model.tokenizer, "contract": {}}
    cards = {}
    for dimensions in (None, 16):
        encoding = _encoding(normalize=normalize, dimensions=dimensions)
        with caplog.at_level("WARNING", logger="readapt_ray"):
            write_model_files(Location(str(tmp_path / f"out{dimensions}")), encoding=encoding, **written)
        cards[dimensions] = model_card(
            encoding=encoding, scales="", command="", sources=[], survives={}, dtype="float32", measures=[], notes=[]
        )
    assert [record.args for record in caplog.records] == [(16,)]
    assert "truncate_dim" not in cards[None]
    assert 'SentenceTransformer("PATH_OF_THIS_FOLDER", truncate_dim=16)' in cards[16]
    assert ('prompt_name="query", normalize_embeddings=True)' in cards[16]) == normalize


@pytest.mark.parametrize(
    ("query", "passage", "wanted"),
    [
        ("query: {text}", "passage: {title} {text}", {"query": "query: ", "document": "passage: "}),
        ("{text}", "{title} {text}", {"query": "", "document": ""}),
        ("Instruct: {task}\nQuery:{text}", "{text}", {"query": "Instruct: T\nQuery:", "document": ""}),
        ("{{x}} {text}", "{title}\n{text}", {"query": "{x} ", "document": ""}),
        ("q {text} ?", "{text} {title}", {}),
    ],
)
def test_templates_as_prompts(query, passage, wanted):
    assert prompts(_encoding(query_template=query, passage_template=passage, task="T")) == wanted


def test_a_template_that_cannot_be_filled_is_refused():
    with pytest.raises(InputError, match="title"):
        prompts(_encoding(query_template="{query}"))


def test_config_is_that_of_the_headless_class():
    config = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "auto_map": {"x": "y"},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "torch_dtype": "float16",
    }
    made = headless_config(config, dtype="bfloat16", name="x")
    assert made["architectures"] == ["MistralModel"]
    assert made["dtype"] == made["torch_dtype"] == "bfloat16"
    assert not {"auto_map", "quantization_config"} & made.keys()
    assert headless_config({"model_type": "bert"}, dtype="float32", name="x")["architectures"] == ["BertModel"]
    with pytest.raises(ModelError, match="'nosuch'"):
        headless_config({"model_type": "nosuch"}, dtype="float32", name="x")


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear", "factor": 2.0}])
def test_the_rope_is_written_as_older_libraries_read_it_too(tmp_path, scaling):
    from transformers import AutoConfig, LlamaConfig

    rope = {"rope_theta": 5e5, "rope_type": "default", **scaling}
    config = LlamaConfig(rope_parameters=rope).to_dict()
    made = headless_config(config, dtype="float32", name="x")
    assert made["rope_theta"] == 5e5
    assert made.get("rope_scaling") == (scaling or None)
    (tmp_path / "config.json").write_text(json.dumps(made))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope
    older = {"model_type": "llama", "rope_theta": 1e4}
    assert headless_config(older, dtype="float32", name="x")["rope_theta"] == 1e4


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "bases", "scaling", "older"),
    [
        (
            "gemma3_text",
            (2e6, 2e4),
            LINEAR,
            {"rope_theta": 2e6, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR},
        ),
        ("modernbert", (3e5, 2e4), {}, {"global_rope_theta": 3e5, "local_rope_theta": 2e4}),
        ("olmo3", (3e5, 3e5), LINEAR, {"rope_theta": 3e5, "rope_scaling": LINEAR}),
        ("olmo3", (3e5, 2e4), {}, {}),
        ("modernbert", (3e5, 2e4), LINEAR, {}),
        ("ministral", (3e5, 2e4), {}, {}),
    ],
)
def test_a_rope_for_each_kind_of_layer_is_written_as_transformers_4_reads_it(tmp_path, kind, bases, scaling, older):
    """Or nothing is written, and a warning says so."""
    from transformers import AutoConfig

    layers = {
        "full_attention": {"rope_type": "default", "rope_theta": bases[0], **scaling},
        "sliding_attention": {"rope_type": "default", "rope_theta": bases[1]},
    }
    config = AutoConfig.for_model(kind).to_dict() | {"rope_parameters": layers}
    made = headless_config(config, dtype="float32", name="x")
    written = {name: value for name, value in made.items() if "rope_" in name and name != "rope_parameters"}
    assert written == older
    (tmp_path / "config.json").write_text(json.dumps(made))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == layers


def test_a_rope_that_older_options_cannot_say_is_warned_of(caplog):
    layers = {kind: {"rope_theta": 1e4, **LINEAR} for kind in ("full_attention", "sliding_attention")}
    for kind in ("gemma3_text", "modernbert", "ministral"):
        headless_config({"model_type": kind, "rope_parameters": layers}, dtype="float32", name=kind)
        assert f"{kind} has other rotary settings for each kind of layer" in caplog.text


def test_the_pooling_is_written_as_other_servers_read_it(tmp_path):
    source = factories.tiny_decoder(tmp_path / "in")
    model = open_model(str(source))
    write_model_files(
        Location(str(tmp_path / "out")),
        config=headless_config(model.read_json("config.json"), dtype="float32", name="x"),
        tokenizer=model.tokenizer,
        encoding=_encoding(),
        contract={},
    )
    pooling = json.loads((tmp_path / "out/1_Pooling/config.json").read_text())
    # text-embeddings-inference parses these four and stops where one is missing.
    for mode in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"):
        assert pooling[f"pooling_mode_{mode}"] is False
    # vLLM takes the first key that is true.
    assert next(key for key, value in pooling.items() if value is True) == "pooling_mode_lasttoken"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert isinstance(config["pad_token_id"], int)
    assert config["architectures"] == ["LlamaModel"]
    types = [each["type"] for each in json.loads((tmp_path / "out/modules.json").read_text())]
    assert types == [f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Normalize")]
    assert json.loads((tmp_path / "out/sentence_bert_config.json").read_text()).keys() == {
        "max_seq_length",
        "do_lower_case",
    }


def test_bytes_in_the_plan_are_those_on_disk(tmp_path):
    plan = _write(_same(factories.tiny_decoder(tmp_path / "in")), tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == 8 + header + plan.num_bytes
    assert math.gcd(header, 8) == 8
