"""Tiny models, tokenizers, adapters and corpora, made in code in milliseconds, the same for the same seed."""

import collections
import json
import random
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file, save_file

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact, Workspace
from readapt_ray.config import StageConfig
from readapt_ray.records import QREL_SCHEMA, QUERY_SCHEMA, Passage, Qrel, Query, content_hash
from readapt_ray.sources.parts import passage_table

DECODER_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
ENCODER_TARGETS = ("query", "key", "value", "intermediate.dense", "output.dense")

_TOPICS = {
    "arrays": ["array", "shape", "axis", "dtype", "stride", "broadcast", "slice", "index", "reshape", "buffer"],
    "threads": ["thread", "lock", "queue", "worker", "event", "semaphore", "deadlock", "barrier", "pool", "signal"],
    "files": ["file", "path", "folder", "stream", "read", "write", "seek", "flush", "rename", "encoding"],
    "graphs": ["graph", "node", "edge", "cycle", "weight", "tree", "root", "leaf", "traversal", "neighbour"],
}
_GLUE = ["the", "a", "of", "in", "to", "returns", "when", "is", "for", "with", "each", "and", "or", "by", "from"]


def small_corpus(num_passages: int = 40, *, seed: int = 0) -> list[Passage]:
    """Passages of some 20 words in four topics; each fifth has no title."""
    rng = random.Random(seed)
    names = list(_TOPICS)
    passages = []
    for number in range(num_passages):
        topic = names[number % len(names)]
        words = [rng.choice(_TOPICS[topic]) if rng.random() < 0.6 else rng.choice(_GLUE) for _ in range(20)]
        title = "" if number % 5 == 4 else f"{topic} {words[0]}"
        passages.append(Passage(f"d{number:05d}", title, " ".join([*words, f"number {number}."])))
    return passages


def small_queries(passages: Sequence[Passage], num_queries: int = 8) -> tuple[list[Query], list[Qrel]]:
    """Queries made of a passage's own words, and the judgement that this passage answers it."""
    chosen = passages[: num_queries * 3 : 3] if len(passages) >= num_queries * 3 else passages[:num_queries]
    queries = [Query(f"q{number:04d}", " ".join(each.text.split()[:8])) for number, each in enumerate(chosen)]
    return queries, [Qrel(query.query_id, each.doc_id, 1) for query, each in zip(queries, chosen, strict=True)]


class _IngestConfig(StageConfig):
    """Stands for the options of the ingest stage."""

    num_passages: int
    """How many passages."""


def ingest_artifact(
    folder: Path,
    passages: Sequence[Passage],
    queries: Sequence[Query] = (),
    qrels: Sequence[Qrel] = (),
    *,
    split: str = "test",
    num_files: int = 1,
) -> Artifact:
    """What `readapt ingest` would write of these records."""

    def write(workspace: Workspace) -> None:
        root = workspace.location.local_path
        for number in range(num_files):
            file = root / f"passages/part-{number:05d}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            chosen = list(passages[number::num_files])
            hashes = [content_hash(passage.title, passage.text) for passage in chosen]
            pq.write_table(passage_table(chosen, hashes), file, row_group_size=4096)
        if queries:
            _write_parquet(root / "queries/part-00000.parquet", QUERY_SCHEMA, queries)
        if qrels:
            _write_parquet(root / f"qrels/{split}.parquet", QREL_SCHEMA, qrels)
        num_bytes = sum(len(each.text.encode()) + len(each.title.encode()) for each in passages)
        workspace.counts |= {"num_passages": len(passages), "num_queries": len(queries), "num_bytes": num_bytes}
        workspace.details |= {"bad_rows": [], "num_duplicates": 0}

    content = artifacts.fingerprint([list(passages), list(queries), list(qrels), num_files])
    config = _IngestConfig(output=str(folder), num_passages=len(passages))
    return artifacts.produce("ingest", config, inputs={"source": content}, work=write)


def _write_parquet(path: Path, schema: pa.Schema, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([row._asdict() for row in rows], schema=schema), path, row_group_size=4096)


def _tokenizer_text() -> list[str]:
    return [f"{passage.title} {passage.text}" for passage in small_corpus(200, seed=7)] + ["query: passage: Instruct:"]


def decoder_tokenizer(vocab_size: int = 384, *, padding_side: str = "right") -> Any:
    """A byte-level BPE tokenizer with <s>, </s> and <pad> that adds no special id by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side=padding_side,
        model_max_length=256,
    )


def encoder_tokenizer(vocab_size: int = 384) -> Any:
    """A WordPiece tokenizer that puts [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # Made by hand: the trainer of WordPiece gives another vocabulary each time.
    letters = sorted(set(string.ascii_lowercase + string.digits + string.punctuation))
    words = collections.Counter(word for text in _tokenizer_text() for word in re.findall(r"[a-z]{2,}", text.lower()))
    common = sorted(words, key=lambda word: (-words[word], word))
    entries = [*specials, *letters, *(f"##{letter}" for letter in letters), *common][:vocab_size]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=256,
    )


def tiny_decoder(
    folder: Path,
    *,
    seed: int = 0,
    vocab_size: int = 384,
    hidden_size: int = 32,
    num_layers: int = 2,
    tie_word_embeddings: bool = True,
    dtype: str = "float32",
    shards: int = 1,
    headless: bool = False,
    padding_side: str = "right",
) -> Path:
    """A Llama-architecture causal LM with its tokenizer in `folder`; headless leaves the LM head and `model.` out."""
    from transformers import LlamaConfig

    tokenizer = decoder_tokenizer(vocab_size, padding_side=padding_side)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
    )
    return _write_model(
        Path(folder), config, "LlamaForCausalLM", tokenizer, seed=seed, dtype=dtype, shards=shards, headless=headless
    )


def tiny_encoder(
    folder: Path,
    *,
    seed: int = 0,
    vocab_size: int = 384,
    hidden_size: int = 32,
    num_layers: int = 2,
    dtype: str = "float32",
    shards: int = 1,
    headless: bool = False,
) -> Path:
    """A BERT masked LM with its tokenizer in `folder`; headless leaves the LM head and `bert.` out."""
    from transformers import BertConfig

    tokenizer = encoder_tokenizer(vocab_size)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
    )
    return _write_model(
        Path(folder), config, "BertForMaskedLM", tokenizer, seed=seed, dtype=dtype, shards=shards, headless=headless
    )


def _write_model(
    folder: Path, config: Any, architecture: str, tokenizer: Any, *, seed: int, dtype: str, shards: int, headless: bool
) -> Path:
    import transformers

    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in getattr(transformers, architecture)(config).state_dict().items()
        }
    tied = ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"]
    if getattr(config, "tie_word_embeddings", True):
        tied.append("lm_head.weight")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        if name in tied:
            continue
        noise = torch.randn(shape, generator=generator)
        is_norm = "norm" in name.lower() and name.endswith("weight")
        tensors[name] = (1 + 0.1 * noise if is_norm else 0.1 * noise).to(getattr(torch, dtype))
    config.architectures = [architecture]
    if headless:
        tensors = without_head(tensors)
        config.architectures = [architecture.replace("ForCausalLM", "Model").replace("ForMaskedLM", "Model")]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_tensors(folder, tensors, shards=shards)
    return folder


def without_head(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the headless model, under its names."""
    return {
        name.removeprefix("model.").removeprefix("bert."): tensor
        for name, tensor in tensors.items()
        if not name.startswith(("lm_head.", "cls."))
    }


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 1) -> None:
    """safetensors in `folder`, replacing those there: one file, or several with their index."""
    for old in [*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")]:
        old.unlink()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(contiguous)
    weight_map = {}
    for number in range(shards):
        file_name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[number::shards]
        save_file({name: contiguous[name] for name in chosen}, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file_name)
    total = sum(tensor.nbytes for tensor in contiguous.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder, under the names of its files."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(path)
    return tensors


def full_retriever(
    folder: Path,
    pretrained: Path,
    *,
    seed: int = 1,
    scale: float = 0.02,
    dtype: str | None = None,
    shards: int = 1,
    headless: bool = True,
) -> Path:
    """A model that differs from `pretrained` by noise of standard deviation `scale` in every tensor.

    It has the tokenizer and config of `pretrained`; headless (as published retrievers are) leaves the
    LM head out. `dtype` is that of `pretrained` unless given.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in pretrained.glob("*.json"):
        if not path.name.endswith(".index.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in sorted(read_tensors(pretrained).items()):
        moved = tensor.float() + scale * torch.randn(tensor.shape, generator=generator)
        tensors[name] = moved.to(getattr(torch, dtype) if dtype else tensor.dtype)
    config = json.loads((folder / "config.json").read_text())
    if headless:
        tensors = without_head(tensors)
        config["architectures"] = [
            name.replace("ForCausalLM", "Model").replace("ForMaskedLM", "Model") for name in config["architectures"]
        ]
    config["dtype"] = dtype or config.get("dtype")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tensors(folder, tensors, shards=shards)
    return folder


def write_contract(folder: Path, **encoding: Any) -> Path:
    """`readapt.json` in `folder`: last-token pooling with BOS and EOS, unless told otherwise."""
    values = {
        "query_template": "query: {text}",
        "passage_template": "passage: {title} {text}",
        "pooling": "last",
        "normalize": True,
        "add_bos": True,
        "add_eos": True,
        "max_query_tokens": 32,
        "max_passage_tokens": 64,
    } | encoding
    (Path(folder) / "readapt.json").write_text(json.dumps({"encoding": values}, indent=2))
    return Path(folder)


def lora_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int = 2,
    rank: int = 4,
    alpha: float = 8,
    use_dora: bool = False,
    targets: Sequence[str] | None = None,
    headless: bool = False,
    size: float = 0.1,
    **options: Any,
) -> Path:
    """A LoRA (or DoRA) adapter on the model in `base`, made and saved by plain PEFT, with factors far from zero.

    Headless lays it on AutoModel, else on the model with its LM head; `size` is the standard deviation of the
    factors; `options` go to `peft.LoraConfig` (use_rslora, rank_pattern, alpha_pattern, modules_to_save, bias, ...).
    """
    import peft
    import transformers

    base = Path(base)
    encoder = json.loads((base / "config.json").read_text())["architectures"][0].endswith(("MaskedLM", "BertModel"))
    headed = "AutoModelForMaskedLM" if encoder else "AutoModelForCausalLM"
    loader = getattr(transformers, "AutoModel" if headless else headed)
    kept = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    model = loader.from_pretrained(str(base))
    transformers.utils.logging.set_verbosity(kept)
    chosen = list(targets or (ENCODER_TARGETS if encoder else DECODER_TARGETS))
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, use_dora=use_dora, target_modules=chosen, **options)
    adapted = peft.get_peft_model(model.float(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return Path(folder)


def dora_adapter(folder: Path, base: Path, *, seed: int = 3, **options: Any) -> Path:
    """As `lora_adapter`, with magnitudes that moved."""
    return lora_adapter(folder, base, seed=seed, use_dora=True, **options)


def run_file(folder: Path, *, num_passages: int, num_queries: int, **sections: dict[str, Any]) -> Path:
    """A run.yaml on a tiny pair and a small judged corpus, all in this folder; `sections` are those of stages."""
    base = tiny_decoder(folder / "base")
    write_contract(lora_adapter(folder / "retriever", base))
    passages = small_corpus(num_passages)
    artifact = ingest_artifact(folder / "made", passages, *small_queries(passages, num_queries))
    for name in ("passages", "queries", "qrels"):
        (artifact.location.local_path / name).rename(folder / name)
    values = {
        "source": str(folder / "passages"),
        "queries": str(folder / "queries"),
        "qrels": str(folder / "qrels"),
        "pretrained": str(base),
        "retriever": str(folder / "retriever"),
        "evaluate": {"measures": "nDCG@10"},
        **sections,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def packed_corpus(folder: Path) -> tuple[Path, Path]:
    """A tiny pretrained model, and 160 passages in blocks of 64 tokens; Ray packs them."""
    from readapt_ray.stages.pack import PackConfig, pack

    base = tiny_decoder(folder / "base")
    ingest_artifact(folder / "corpus", small_corpus(160))
    blocks = str(folder / "blocks")
    pack(PackConfig(pretrained=str(base), corpus=str(folder / "corpus"), output=blocks, mode="packed", block_tokens=64))
    return base, folder / "blocks"
