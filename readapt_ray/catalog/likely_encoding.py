"""Guess the encoding of a model from its architecture and tokenizer, if its folder does not define it.

In: config.json and the tokenizer. Out: a guess, which is shown to the user or written on request, but never used by
itself.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from readapt_ray.catalog.encoding import Encoding, Pooling
from readapt_ray.catalog.special_tokens import added_by_itself

_POOLING_BY_FAMILY: Final[dict[str, Pooling]] = {
    "modernbert": "cls",
    "gte": "cls",
    "bert": "mean",
    "xlm-roberta": "mean",
}
"""Usual pooling by `model_type`. gte-modernbert, gte-multilingual and granite-embedding-r2 use CLS; E5, GTE on BERT and
MiniLM use the mean."""
_COUNTS_FROM_PADDING: Final = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet"})
"""Values of `model_type` whose position ids start after the padding's."""
_MAX_TOKENS: Final = 512


def guess_encoding(config: Mapping[str, Any], tokenizer: Any | None) -> Encoding:
    """Guess pooling, BOS/EOS tokens and token limits (at most 512) of a model. Prompts are not guessed.

    Args:
        config: content of its config.json; for an adapter, of its base's.
        tokenizer: as transformers loads it; None if there is none, which counts as one that adds BOS and EOS.
    """
    pooling = _POOLING_BY_FAMILY.get(str(config.get("model_type"))) or ("last" if _is_causal(config) else "mean")
    before, after = added_by_itself(tokenizer) if tokenizer is not None else (["BOS"], ["EOS"])
    ends = pooling == "last" and getattr(tokenizer, "eos_token", None) is not None
    limit = min(_MAX_TOKENS, usable_positions(config))
    return Encoding(
        pooling=pooling,
        add_bos=bool(before),
        add_eos=bool(after) or ends,
        max_query_tokens=limit,
        max_passage_tokens=limit,
    )


def usable_positions(config: Mapping[str, Any]) -> int:
    """Return the longest text, in tokens, that a model has positions for; 512 if its config does not say.

    Args:
        config: content of its config.json. The positions of models like RoBERTa, which start after the padding's, count
            less.
    """
    positions = int(config.get("max_position_embeddings") or _MAX_TOKENS)
    if config.get("model_type") in _COUNTS_FROM_PADDING:
        positions -= int(config.get("pad_token_id") or 0) + 1
    return positions


def as_contract(encoding: Encoding) -> str:
    """Return an encoding as a short readapt.json: settings without a default, templates, and changed lengths."""
    named = {name: getattr(encoding, name) for name in ("pooling", "add_bos", "add_eos")}
    templates = {name: getattr(encoding, name) for name in ("query_template", "passage_template")}
    limits = {
        name: getattr(encoding, name)
        for name in ("max_query_tokens", "max_passage_tokens")
        if name in _changed(encoding)
    }
    first, second = (json.dumps(part)[1:-1] for part in (named, templates | limits))
    return f'{{"encoding": {{\n  {first},\n  {second}}}}}'


def _changed(encoding: Encoding) -> set[str]:
    return set(encoding.model_dump(exclude_defaults=True))


def _is_causal(config: Mapping[str, Any]) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.get("model_type")
    is_decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return is_decoder and not config.get("use_bidirectional_attention") and config.get("is_causal") is not False
