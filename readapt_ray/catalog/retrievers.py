"""List the known retrievers: the encoding of each, and the pretrained model from which it was made.

A model that is not in this catalog needs its encoding in its folder (`readapt.json`, or the files of
sentence-transformers), or as an option.
"""

import re
from typing import Literal

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.config import Config
from readapt_ray.errors import ModelError

Objective = Literal["causal_lm", "masked_lm"]


class Retriever(Config):
    """A row of the catalog of retrievers."""

    name: str
    """Name on the command line."""
    hub_id: str
    """Hub id of its weights; `builtin:` for models in this package."""
    pretrained: str
    """Catalog name or hub id of the model before retrieval training."""
    encoding: Encoding
    """Its prompts, special tokens, pooling and maximum lengths."""
    dora_targets: tuple[str, ...]
    """Modules that a knowledge adapter is trained on: query, key, value, up and down projections."""
    objective: Objective = "causal_lm"
    """Objective with which its pretrained model is trained on unlabelled text."""
    source: str
    """Source of these facts."""


LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
BERT_TARGETS = ("query", "key", "value", "intermediate.dense", "output.dense")

_LLAMA_LIKE = (
    "llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2",
    "olmo3", "smollm3", "nomic_bert", "eurobert", "gte",
)  # fmt: skip
_BERT_LIKE = ("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra")

TARGETS_BY_FAMILY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_LLAMA_LIKE, LLAMA_TARGETS),
    **dict.fromkeys(_BERT_LIKE, BERT_TARGETS),
    "phi3": ("qkv_proj", "gate_up_proj", "down_proj"),
    "modernbert": ("Wqkv", "Wi", "mlp.Wo"),
    "modernbert-decoder": ("q_proj", "k_proj", "v_proj", "Wi", "mlp.Wo"),
    "mpnet": ("attn.q", "attn.k", "attn.v", "intermediate.dense", "output.dense"),
    "distilbert": ("q_lin", "k_lin", "v_lin", "lin1", "lin2"),
    "albert": ("query", "key", "value", "ffn", "ffn_output"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"),
    "jina_embeddings_v3": ("q_proj", "k_proj", "v_proj", "fc1", "fc2"),
}
"""Names of the query, key, value, up and down projections, by the `model_type` of transformers' configs."""

_PINNED = re.compile(r"([^:@]+)@([0-9a-f]{40})")
_HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")
_WEB_TASK = "Given a web search query, retrieve relevant passages that answer the query"


def _instructed(**changes: object) -> Encoding:
    values: dict[str, object] = {
        "query_template": "Instruct: {task}\nQuery: {text}",
        "task": _WEB_TASK,
        "pooling": "last",
        "add_bos": True,
        "add_eos": True,
    }
    return Encoding.model_validate(values | changes)


def _encoder(**changes: object) -> Encoding:
    return Encoding.model_validate({"pooling": "mean", "add_bos": True, "add_eos": True} | changes)


_E5 = (
    ("e5-small-v2", "microsoft/MiniLM-L12-H384-uncased", "2212.03533"),
    ("e5-base-v2", "google-bert/bert-base-uncased", "2212.03533"),
    ("e5-large-v2", "google-bert/bert-large-uncased-whole-word-masking", "2212.03533"),
    ("multilingual-e5-small", "microsoft/Multilingual-MiniLM-L12-H384", "2402.05672"),
    ("multilingual-e5-base", "FacebookAI/xlm-roberta-base", "2402.05672"),
    ("multilingual-e5-large", "FacebookAI/xlm-roberta-large", "2402.05672"),
)
"""Name, pretrained model and paper of each E5 encoder. Without its prompts, one of these finds far less."""

RETRIEVERS: tuple[Retriever, ...] = (
    Retriever(
        name="quickstart-retriever",
        hub_id="builtin:quickstart/retriever",
        pretrained="quickstart-pretrained",
        encoding=Encoding(
            query_template="query: {text}",
            passage_template="passage: {title} {text}",
            pooling="last",
            add_bos=True,
            add_eos=True,
            max_query_tokens=64,
            max_passage_tokens=128,
        ),
        dora_targets=LLAMA_TARGETS,
        source="made by benchmarks/quickstart_pair.py",
    ),
    Retriever(
        name="repllama",
        hub_id="castorini/repllama-v1-7b-lora-passage",
        pretrained="meta-llama/Llama-2-7b-hf",
        encoding=Encoding(
            query_template="query: {text}",
            passage_template="passage: {title} {text}",
            pooling="last",
            add_bos=True,
            add_eos=True,
        ),
        dora_targets=LLAMA_TARGETS,
        source="texttron/tevatron examples/repllama/{data,repllama}.py",
    ),
    Retriever(
        name="e5-mistral",
        hub_id="intfloat/e5-mistral-7b-instruct",
        pretrained="mistralai/Mistral-7B-v0.1",
        encoding=_instructed(),
        dora_targets=LLAMA_TARGETS,
        source="microsoft/unilm e5/utils.py, e5/mteb_beir_eval.py",
    ),
    Retriever(
        name="sfr-embedding-mistral",
        hub_id="Salesforce/SFR-Embedding-Mistral",
        pretrained="mistralai/Mistral-7B-v0.1",
        encoding=_instructed(),
        dora_targets=LLAMA_TARGETS,
        source="model card of Salesforce/SFR-Embedding-Mistral, from memory",
    ),
    Retriever(
        name="linq-embed-mistral",
        hub_id="Linq-AI-Research/Linq-Embed-Mistral",
        pretrained="mistralai/Mistral-7B-v0.1",
        encoding=_instructed(),
        dora_targets=LLAMA_TARGETS,
        source="model card of Linq-AI-Research/Linq-Embed-Mistral, from memory",
    ),
    *(
        Retriever(
            name=f"qwen3-embedding-{size.lower()}",
            hub_id=f"Qwen/Qwen3-Embedding-{size}",
            pretrained=f"Qwen/Qwen3-{size}-Base",
            encoding=_instructed(query_template="Instruct: {task}\nQuery:{text}", add_bos=False),
            dora_targets=LLAMA_TARGETS,
            source=f"model card of Qwen/Qwen3-Embedding-{size}, from memory",
        )
        for size in ("0.6B", "4B", "8B")
    ),
    *(
        Retriever(
            name=name,
            hub_id=f"intfloat/{name}",
            pretrained=pretrained,
            encoding=_encoder(query_template="query: {text}", passage_template="passage: {title} {text}"),
            dora_targets=BERT_TARGETS,
            objective="masked_lm",
            source=f"model card of intfloat/{name}; pretrained: arXiv {paper}, from memory; its files name no prompts",
        )
        for name, pretrained, paper in _E5
    ),
    Retriever(
        name="m3e-base",
        hub_id="moka-ai/m3e-base",
        pretrained="hfl/chinese-roberta-wwm-ext",
        encoding=_encoder(),
        dora_targets=BERT_TARGETS,
        objective="masked_lm",
        source="model card of moka-ai/m3e-base, from memory",
    ),
    Retriever(
        name="bge-base-zh",
        hub_id="BAAI/bge-base-zh",
        pretrained="hfl/chinese-roberta-wwm-ext",
        encoding=_encoder(pooling="cls", query_template="为这个句子生成表示以用于检索相关文章：{text}"),
        dora_targets=BERT_TARGETS,
        objective="masked_lm",
        source="model card of BAAI/bge-base-zh, from memory",
    ),
    Retriever(
        name="bce-embedding-base",
        hub_id="maidalun1020/bce-embedding-base_v1",
        pretrained="FacebookAI/xlm-roberta-base",
        encoding=_encoder(pooling="cls"),
        dora_targets=BERT_TARGETS,
        objective="masked_lm",
        source="model card of maidalun1020/bce-embedding-base_v1, from memory",
    ),
    Retriever(
        name="all-minilm-l6-v2",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        pretrained="nreimers/MiniLM-L6-H384-uncased",
        encoding=_encoder(max_query_tokens=256, max_passage_tokens=256),
        dora_targets=BERT_TARGETS,
        objective="masked_lm",
        source="its modules.json and sentence_bert_config.json",
    ),
)

PRETRAINED: dict[str, str] = {"quickstart-pretrained": "builtin:quickstart/pretrained"}
"""Pretrained models that have a catalog name, with their location. All others are named by hub id."""


def target_modules(model_type: str) -> tuple[str, ...]:
    """Return the last parts of the names of the layers that get a knowledge adapter: `q_proj`, `k_proj`, ...

    Args:
        model_type: the `model_type` of the model's config.json.

    Raises:
        ModelError: the `model_type` is unknown.
    """
    if model_type not in TARGETS_BY_FAMILY:
        raise ModelError(
            f"no target modules are known for models of the type {model_type!r}; give --target-modules, the last parts of the "
            f"names of its query, key, value, up and down projections (known: {', '.join(TARGETS_BY_FAMILY)})"
        )
    return TARGETS_BY_FAMILY[model_type]


def find_retriever(name: str) -> Retriever | None:
    """Return the catalog's row of a catalog name or hub id; None if the model is not in the catalog.

    Lower or upper case does not matter, and `@commit` is ignored.
    """
    plain = split_commit(name)[0].lower()
    return next((row for row in RETRIEVERS if plain in (row.name, row.hub_id.lower())), None)


def split_commit(name: str) -> tuple[str, str | None]:
    """Split `owner/name@commit` into name and commit; the commit is None if the name has none.

    A commit has 40 hexadecimal digits in lower case; anything else after `@` stays in the name.
    """
    found = _PINNED.fullmatch(name)
    return (found[1], found[2]) if found else (name, None)


def find_cached(place: str) -> Retriever | None:
    """Return the catalog's row of a model in the hub's cache, by the path of its folder; None if it has none.

    Args:
        place: path of the folder, which ends with `models--OWNER--NAME/snapshots/COMMIT`; any other gives None.
    """
    cached = _HUB_CACHE.search(place)
    return find_retriever(f"{cached[1]}/{cached[2]}") if cached else None


def find_copied(place: str) -> Retriever | None:
    """Return the catalog's row of a model whose name on the hub is the name of this folder; None if there is none.

    Another model may have the same name, so this is a guess.

    Args:
        place: path or URI of the folder.
    """
    if _HUB_CACHE.search(place):
        return find_cached(place)
    last = place.rstrip("/").rsplit("/", 1)[-1].lower()
    on_hub = (row for row in RETRIEVERS if not row.hub_id.startswith("builtin:"))
    return next((row for row in on_hub if row.hub_id.lower().rsplit("/", 1)[-1] == last), None)


def hub_id(name: str) -> str:
    """Return the hub id of a catalog name, or its `builtin:` name; any other name is returned unchanged.

    A catalog name with `@commit` gives the hub id without it.
    """
    row = find_retriever(name)
    return row.hub_id if row else PRETRAINED.get(name.lower(), name)


def retriever(name: str) -> Retriever:
    """Return the catalog's row of a catalog name or hub id, as `find_retriever` does.

    Raises:
        ModelError: the model is not in the catalog.
    """
    row = find_retriever(name)
    if row is None:
        raise ModelError(f"no retriever {name!r} in the catalog; it has {', '.join(each.name for each in RETRIEVERS)}")
    return row
