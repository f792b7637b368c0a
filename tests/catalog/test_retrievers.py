"""The contract of every row: the exact ids of a query and a passage, on a tokenizer of the row's kind.

Each tokenizer here knows single characters only, so the ids that are due can be written down by hand from
the text that is due; the texts are the published ones, not those that the catalog's templates give.
"""

from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from readapt_ray.catalog.retrievers import RETRIEVERS
from readapt_ray.retrieval.tokenization import TextTokenizer

QUERY, TITLE, TEXT = "how Deep?", "Seas", "very deep"
WEB = "Given a web search query, retrieve relevant passages that answer the query"
CHINESE = "为这个句子生成表示以用于检索相关文章："
LETTERS = sorted({*"\n", *(chr(code) for code in range(32, 127)), *CHINESE})


class Kind(NamedTuple):
    """A tokenizer, the token of each character of a text as it stands there, and what stands around a text."""

    tokenizer: Any
    pieces: Any
    first: str | None
    last: str


def _fast(tokenizer: Tokenizer, **roles: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def llama() -> Kind:
    """Sentencepiece BPE with byte fallback: a space is ▁, one is put in front, a newline is a byte; adds BOS alone."""
    letters = ["▁" if each == " " else each for each in LETTERS if each != "\n"]
    vocabulary = {each: number for number, each in enumerate(["<unk>", "<s>", "</s>", "<0x0A>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])

    def pieces(text: str) -> list[str]:
        return ["▁", *("<0x0A>" if each == "\n" else "▁" if each == " " else each for each in text)]

    return Kind(_fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"), pieces, "<s>", "</s>")


def byte_level(first: str | None = None, last: str = "<|endoftext|>") -> Kind:
    """GPT-2's byte-level BPE: a space is Ġ, a newline Ċ; Qwen's eos_token is <|im_end|>, and it adds <|endoftext|>."""
    letters = [{" ": "Ġ", "\n": "Ċ"}.get(each, each) for each in LETTERS if each.isascii()]
    specials = [each for each in (first, last, "<|im_end|>") if each]
    vocabulary = {each: number for number, each in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    roles = {"eos_token": last} if first else {"eos_token": "<|im_end|>"}
    if first:
        roles["bos_token"] = first
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {last}", special_tokens=[(last, vocabulary[last])]
        )
    return Kind(
        _fast(tokenizer, **roles), lambda text: [{" ": "Ġ", "\n": "Ċ"}.get(each, each) for each in text], first, last
    )


def bert() -> Kind:
    """WordPiece in lower case: pieces after the first of a word have ##, punctuation and Chinese characters stand alone."""
    letters = [each for each in LETTERS if not each.isspace() and each == each.lower()]
    words = [*letters, *(f"##{each}" for each in letters)]
    vocabulary = {each: number for number, each in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )

    def pieces(text: str) -> list[str]:
        found, inside = [], False
        for each in text.lower():
            is_letter = each.isascii() and each.isalnum()
            if not each.isspace():
                found.append(f"##{each}" if inside and is_letter else each)
            inside = is_letter
        return found

    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    return Kind(_fast(tokenizer, **roles), pieces, "[CLS]", "[SEP]")


def xlm_roberta() -> Kind:
    """Sentencepiece unigram: ▁ before each word; <s> is 0, <pad> 1, </s> 2."""
    letters = ["▁", *(each for each in LETTERS if not each.isspace())]
    entries = [(each, -1.0) for each in ("<s>", "<pad>", "</s>", "<unk>", *letters)]
    tokenizer = Tokenizer(models.Unigram(entries, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return Kind(
        _fast(tokenizer, **roles, unk_token="<unk>"), lambda text: list("▁" + text.replace(" ", "▁")), "<s>", "</s>"
    )


PREFIXED = (f"query: {QUERY}", f"passage: {TITLE} {TEXT}", f"passage: {TEXT}")
PLAIN = (f"{TITLE} {TEXT}", TEXT)
INSTRUCTED = (f"Instruct: {WEB}\nQuery: {QUERY}", *PLAIN)
DUE = {
    "quickstart-retriever": (lambda: byte_level("<s>", "</s>"), *PREFIXED),
    "repllama": (llama, *PREFIXED),
    "e5-mistral": (llama, *INSTRUCTED),
    "sfr-embedding-mistral": (llama, *INSTRUCTED),
    "linq-embed-mistral": (llama, *INSTRUCTED),
    "qwen3-embedding-0.6b": (byte_level, f"Instruct: {WEB}\nQuery:{QUERY}", *PLAIN),
    "qwen3-embedding-4b": (byte_level, f"Instruct: {WEB}\nQuery:{QUERY}", *PLAIN),
    "qwen3-embedding-8b": (byte_level, f"Instruct: {WEB}\nQuery:{QUERY}", *PLAIN),
    **dict.fromkeys(("e5-small-v2", "e5-base-v2", "e5-large-v2"), (bert, *PREFIXED)),
    **dict.fromkeys(
        ("multilingual-e5-small", "multilingual-e5-base", "multilingual-e5-large"), (xlm_roberta, *PREFIXED)
    ),
    "m3e-base": (bert, QUERY, *PLAIN),
    "bge-base-zh": (bert, CHINESE + QUERY, *PLAIN),
    "bce-embedding-base": (xlm_roberta, QUERY, *PLAIN),
    "all-minilm-l6-v2": (bert, QUERY, *PLAIN),
}
"""By row: its kind of tokenizer, the text of the query, of the passage, and of the passage without a title."""


def test_every_row_has_its_contract_here() -> None:
    assert set(DUE) == {row.name for row in RETRIEVERS}


@pytest.mark.parametrize("row", RETRIEVERS, ids=lambda row: row.name)
def test_a_row_gives_exactly_the_ids_that_are_due(row: Any) -> None:
    make, *texts = DUE[row.name]
    kind = make()
    vocabulary = kind.tokenizer.get_vocab()
    due = [
        [vocabulary[piece] for piece in ([kind.first] if kind.first else []) + kind.pieces(text) + [kind.last]]
        for text in texts
    ]
    tokenizer = TextTokenizer(kind.tokenizer, row.encoding)
    made = [*tokenizer.ids([QUERY], "query"), *tokenizer.ids([TEXT, TEXT], "passage", [TITLE, ""])]
    assert made == due
    for ids in made:
        assert ids[-1] == vocabulary[kind.last]
        assert (ids[0] == vocabulary[kind.first]) if kind.first else ids[0] != vocabulary["<|im_end|>"]


@pytest.mark.parametrize("row", RETRIEVERS, ids=lambda row: row.name)
def test_a_long_text_is_cut_before_its_last_special(row: Any) -> None:
    kind = DUE[row.name][0]()
    tokenizer = TextTokenizer(kind.tokenizer, row.encoding)
    limits = {"quickstart-retriever": (64, 128), "all-minilm-l6-v2": (256, 256)}.get(row.name, (512, 512))
    for name, limit in zip(("query", "passage"), limits, strict=True):
        (ids,) = tokenizer.ids(["very deep " * 500], name)
        assert len(ids) == limit
        assert ids[-1] == kind.tokenizer.get_vocab()[kind.last]


def test_pooling_and_bases_are_those_of_the_model_cards() -> None:
    last, mean, cls = (
        {row.name for row in RETRIEVERS if row.encoding.pooling == kind} for kind in ("last", "mean", "cls")
    )
    e5 = {name for name in DUE if "e5-" in name and name != "e5-mistral"}
    assert mean == {"m3e-base", "all-minilm-l6-v2"} | e5 and len(e5) == 6
    assert cls == {"bge-base-zh", "bce-embedding-base"}
    assert len(last) == 8
    assert all(row.encoding.normalize for row in RETRIEVERS)
    bases = {row.name: row.pretrained for row in RETRIEVERS}
    assert bases["repllama"] == "meta-llama/Llama-2-7b-hf"
    assert bases["e5-mistral"] == bases["linq-embed-mistral"] == "mistralai/Mistral-7B-v0.1"
    assert bases["qwen3-embedding-4b"] == "Qwen/Qwen3-4B-Base"
    for row in RETRIEVERS:
        expected = "masked_lm" if row.name in mean | cls else "causal_lm"
        assert row.objective == expected
        assert ("q_proj" in row.dora_targets) == (expected == "causal_lm")
        assert len(row.dora_targets) == 5
        assert row.source
