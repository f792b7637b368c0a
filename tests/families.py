"""Tiny models of the families that retrievers are made of, as transformers and sentence-transformers save them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests import factories

_SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
}
_ENCODER_IDS = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
_DECODER_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True, eq=False)
class Family:
    """How a tiny model of a family is made."""

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of its transformers config, beyond the sizes of all."""
    is_decoder: bool = False
    dense: tuple[tuple[int, str], ...] = ()
    """Width and activation of each Dense module."""
    pooling: str = "mean"

    @property
    def head(self) -> str:
        """The class of transformers with its language-model head."""
        return "AutoModelForCausalLM" if self.is_decoder else "AutoModelForMaskedLM"


FAMILIES = {
    # GTE-, Granite- and Ettin-ModernBERT are of this type.
    "modernbert": Family("modernbert", {**_ENCODER_IDS, "num_hidden_layers": 4, "local_attention": 8}, pooling="cls"),
    "xlm-roberta": Family("xlm-roberta", {"pad_token_id": 1}),
    "mpnet": Family("mpnet", {"pad_token_id": 1}),
    "nomic-bert": Family("nomic_bert", {"pad_token_id": 0}),
    "eurobert": Family("eurobert", {**_DECODER_IDS, "mask_token_id": 4, "num_key_value_heads": 2}),
    "jina-v3": Family("jina_embeddings_v3", {**_ENCODER_IDS}),
    "gte": Family("gte", {"pad_token_id": 0}, pooling="cls"),
    "labse": Family("bert", {"pad_token_id": 0}, dense=((32, "Tanh"),), pooling="cls"),
    "gemma3": Family(
        "gemma3_text",
        {**_DECODER_IDS, "num_hidden_layers": 6, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
        is_decoder=True,
        pooling="lasttoken",
    ),
    "embedding-gemma": Family(
        "gemma3_text",
        {
            **_DECODER_IDS,
            "num_hidden_layers": 6,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "use_bidirectional_attention": True,
        },
        is_decoder=True,
        dense=((48, "Identity"), (16, "Identity")),
    ),
    "stella": Family("qwen2", {**_DECODER_IDS, "num_key_value_heads": 2}, is_decoder=True, dense=((24, "Identity"),)),
}


def pretrained(folder: Path, family: Family, *, seed: int = 0) -> Path:
    """A model with its language-model head and its tokenizer."""
    import transformers

    config = transformers.AutoConfig.for_model(family.model_type, **{**_SIZES, **family.options})
    with _quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)  # in bfloat16 a text of one in thousands of such models differs by more than .001
        model = getattr(transformers, family.head).from_config(config)
        _fill(model, seed, deviation=0.1)
        model.save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    return folder


def retriever(folder: Path, base: Path, family: Family, *, seed: int = 1) -> Path:
    """A model that differs from `base` in every weight, with its pooling and Dense modules, saved by sentence-transformers."""
    import transformers
    from sentence_transformers import SentenceTransformer, models

    with _quiet():
        network = transformers.AutoModel.from_pretrained(base)
        _fill(network, seed, deviation=0.02)
        network.save_pretrained(folder)
        tokenizer(family).save_pretrained(folder)
        modules: list[Any] = [models.Transformer(str(folder), max_seq_length=100)]
        width = _SIZES["hidden_size"]
        modules.append(models.Pooling(width, pooling_mode=family.pooling))
        for out, activation in family.dense:
            dense = models.Dense(width, out, activation_function=getattr(torch.nn, activation)())
            _fill(dense, seed + 1, deviation=0.3)
            modules.append(dense)
            width = out
        SentenceTransformer(modules=[*modules, models.Normalize()], device="cpu").save_pretrained(str(folder))
    return folder


@functools.cache
def tokenizer(family: Family) -> Any:
    """A decoder's puts <s> and </s> around a text, an encoder's [CLS] and [SEP]."""
    if not family.is_decoder:
        return factories.encoder_tokenizer()
    from tokenizers.processors import TemplateProcessing

    made = factories.decoder_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> <s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made


def by_sentence_transformers(folder: Path, texts: Sequence[str]) -> Any:
    """What sentence-transformers makes of the texts, float32 [N, D]."""
    from sentence_transformers import SentenceTransformer

    with _quiet():
        return SentenceTransformer(str(folder), device="cpu").encode(list(texts), batch_size=4)


def _fill(module: torch.nn.Module, seed: int, *, deviation: float) -> None:
    """Move each weight by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.add_(deviation * torch.randn(parameter.shape, generator=generator))


def _quiet() -> Any:
    from readapt_ray.weights import loading

    return loading._quiet()
