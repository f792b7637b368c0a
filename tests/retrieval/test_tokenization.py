import json

import pytest

from readapt_ray.catalog import retrievers
from readapt_ray.catalog.encoding import Encoding, EncodingOption, read_encoding
from readapt_ray.config import StageConfig
from readapt_ray.errors import InputError, ModelError
from readapt_ray.retrieval import tokenization
from readapt_ray.retrieval.tokenization import TextTokenizer, fill_passage, fill_query
from tests import factories

REPLLAMA = retrievers.retriever("repllama").encoding
E5 = retrievers.retriever("e5-mistral").encoding
QWEN = retrievers.retriever("qwen3-embedding-0.6b").encoding
MINILM = retrievers.retriever("all-minilm-l6-v2").encoding


@pytest.fixture(scope="module")
def decoder():
    return factories.decoder_tokenizer()


@pytest.fixture(scope="module")
def encoder():
    return factories.encoder_tokenizer()


def _changed(encoding, **options):
    return Encoding.model_validate(encoding.model_dump() | options)


@pytest.mark.parametrize(
    ("template", "title", "text", "filled"),
    [
        ("passage: {title} {text}", "Arrays", "have shapes", "passage: Arrays have shapes"),
        ("passage: {title} {text}", "", "have shapes", "passage: have shapes"),
        ("passage: {title} {text}", "  ", "have shapes", "passage: have shapes"),
        ("{title} {text}", "", "have shapes", "have shapes"),
        ("{title}\n{text}", "", "have shapes ", "have shapes"),
        ("{text} {title}", "", "have shapes", "have shapes"),
        ("{title} {text}", "A {text} {x}", "{title} }{", "A {text} {x} {title} }{"),
        ("{{literal}} {title} {text}", "", "x", "{literal} x"),
        ("passage: {text}", "dropped", "  x\n", "passage:   x"),
        ("passage: {text}", "Arrays", "", "passage: Arrays"),
        ("passage: {title} {text}", "Arrays", "", "passage: Arrays"),
        ("{text}", "Arrays", "", "Arrays"),
    ],
)
def test_passages_are_filled_without_a_double_space(template, title, text, filled):
    assert fill_passage(_changed(REPLLAMA, passage_template=template), title, text) == filled


def test_queries_are_filled_and_not_stripped():
    assert fill_query(E5, "what is an array") == (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: what is an array"
    )
    assert fill_query(QWEN, "x").endswith("query\nQuery:x")
    assert fill_query(REPLLAMA, " x ") == "query:  x "
    assert fill_query(_changed(MINILM, lower_case=True, query_template="Q: {text}"), "ÄB") == "q: äb"


@pytest.mark.parametrize(
    ("template", "named"),
    [("{title}", "no {text}"), ("{text} {other}", "{other}"), ("{text", "cannot be read"), ("{text!r}", "{text}")],
)
def test_templates_that_cannot_be_filled_are_refused(template, named):
    with pytest.raises(InputError) as caught:
        fill_passage(_changed(REPLLAMA, passage_template=template), "", "x")
    assert named in str(caught.value)


@pytest.mark.parametrize("title", ["Arrays", ""])
@pytest.mark.parametrize("encoding", [REPLLAMA, E5, QWEN, MINILM], ids=["repllama", "e5", "qwen", "minilm"])
def test_ids_are_those_of_the_text_between_the_specials(decoder, encoder, encoding, title):
    tokenizer = encoder if encoding is MINILM else decoder
    first, last = (2, 3) if encoding is MINILM else (1, 2)
    by_hand = {
        REPLLAMA: "passage: Arrays have shapes" if title else "passage: have shapes",
        E5: "Arrays have shapes" if title else "have shapes",
        QWEN: "Arrays have shapes" if title else "have shapes",
        MINILM: "Arrays have shapes" if title else "have shapes",
    }
    plain = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(by_hand[encoding], add_special_tokens=False))
    expected = [*([first] if encoding.add_bos else []), *plain, last]
    (ids,) = TextTokenizer(tokenizer, encoding).ids(["have shapes"], "passage", [title])
    assert ids == expected
    assert tokenizer.decode(plain).lower() == by_hand[encoding].lower()


@pytest.mark.parametrize("kind", ["query", "passage"])
def test_long_texts_are_cut_before_the_eos(decoder, kind):
    encoding = _changed(REPLLAMA, max_query_tokens=20, max_passage_tokens=24)
    limit = 20 if kind == "query" else 24
    texts = ["array" + " array" * 499, "x"]
    ids, short = TextTokenizer(decoder, encoding).ids(texts, kind)
    prefix = "query: " if kind == "query" else "passage: "
    uncut = decoder(prefix + texts[0].strip(), add_special_tokens=False, verbose=False)["input_ids"]
    assert ids == [1, *uncut[: limit - 2], 2]
    assert TextTokenizer(decoder, encoding).ids_and_losses(texts, kind)[1] == [len(uncut) - (limit - 2), 0]
    assert short[0] == 1 and short[-1] == 2 and len(short) < limit


def test_a_tokenizer_that_cuts_pads_and_adds_specials_by_itself_changes_nothing(encoder):
    other = factories.encoder_tokenizer()
    other.backend_tokenizer.enable_truncation(4)
    other.backend_tokenizer.enable_padding(length=64)
    texts = ["array shape axis dtype stride", "thread"]
    assert TextTokenizer(other, MINILM).ids(texts, "passage") == TextTokenizer(encoder, MINILM).ids(texts, "passage")
    assert TextTokenizer(encoder, MINILM).ids(texts, "passage") == encoder(texts)["input_ids"]


def test_texts_are_tokenised_some_at_a_time_and_keep_their_order(encoder, monkeypatch):
    texts = ["array shape", "thread", "lock queue", "file", "graph node"]
    expected = encoder(texts)["input_ids"]
    monkeypatch.setattr(tokenization, "_TEXTS_AT_ONCE", 2)
    assert TextTokenizer(encoder, MINILM).ids(texts, "passage") == expected


def test_python_tokenizers_give_the_same_ids(decoder):
    class Slow:
        is_fast = False

        def __getattr__(self, name):
            return getattr(decoder, name)

        def __call__(self, texts, **options):
            return decoder(texts, **options)

    texts = ["array shape", "thread"]
    assert TextTokenizer(Slow(), REPLLAMA).ids(texts, "query") == TextTokenizer(decoder, REPLLAMA).ids(texts, "query")


def test_a_missing_special_is_refused_by_name():
    bare = factories.decoder_tokenizer()
    bare.eos_token = None
    with pytest.raises(ModelError, match=r"eos_token or sep_token.*add_eos to false"):
        TextTokenizer(bare, REPLLAMA)


def test_the_end_token_is_the_one_that_the_tokenizer_itself_adds():
    """Qwen3-Embedding ends texts with <|endoftext|> though its eos_token is <|im_end|>."""
    from tokenizers import processors

    tokenizer = factories.decoder_tokenizer()
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    expected = tokenizer.eos_token_id
    tokenizer.eos_token = bos
    ids = TextTokenizer(tokenizer, _changed(REPLLAMA, add_bos=False)).ids(["array"], "query")[0]
    assert ids[-1] == expected != tokenizer.eos_token_id


def test_a_tokenizer_that_adds_its_specials_anyway_is_refused(decoder):
    class Stubborn:
        is_fast = False

        def __getattr__(self, name):
            return getattr(decoder, name)

        def __call__(self, texts, **options):
            ids = decoder(texts, add_special_tokens=False)["input_ids"]
            eos = decoder.eos_token_id
            return {"input_ids": [[*row, eos] for row in ids] if isinstance(texts, list) else [*ids, eos]}

    with pytest.raises(ModelError, match="told not to"):
        TextTokenizer(Stubborn(), REPLLAMA)


def test_edges(decoder):
    tokenizer = TextTokenizer(decoder, REPLLAMA)
    assert tokenizer.ids([], "query") == []
    bare = TextTokenizer(decoder, _changed(REPLLAMA, add_bos=False, add_eos=False, query_template="{text}"))
    assert bare.ids([""], "query") == [[]]
    assert len(tokenizer.ids(["array " * 200_000], "query")[0]) == 512
    with pytest.raises(InputError, match=r"texts\[1\] is NoneType"):
        tokenizer.ids(["x", None], "query")
    with pytest.raises(InputError, match=r"texts\[1\].*surrogate"):
        tokenizer.ids(["x", "\ud800"], "query")
    with pytest.raises(InputError, match="2 titles for 1 text"):
        tokenizer.ids(["x"], "passage", ["a", "b"])
    with pytest.raises(InputError, match="none for queries"):
        tokenizer.ids(["x"], "query", ["a"])
    with pytest.raises(InputError, match=r"max_query_tokens = 2.*at least 3"):
        TextTokenizer(decoder, _changed(REPLLAMA, max_query_tokens=2))


def test_an_encoding_option_is_a_file_or_an_object(tmp_path):
    class SomeConfig(StageConfig):
        encoding: EncodingOption = None

    file = tmp_path / "encoding.json"
    file.write_text(json.dumps(E5.model_dump(mode="json")))
    assert SomeConfig.parse({"output": "x", "encoding": str(file)}).encoding == E5
    assert SomeConfig.parse({"output": "x", "encoding": E5.model_dump()}).encoding == E5
    assert SomeConfig.parse({"output": "x"}).encoding is None
    with pytest.raises(InputError, match="no file"):
        SomeConfig.parse({"output": "x", "encoding": str(tmp_path / "absent.json")})
    for content, named in (("{", "not JSON"), ("[1]", "JSON object"), ('{"pooling": "sum"}', "pooling")):
        file.write_text(content)
        with pytest.raises(InputError, match=named):
            read_encoding(str(file))
