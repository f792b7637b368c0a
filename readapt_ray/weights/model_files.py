"""Write the files beside the weights, so that transformers, sentence-transformers and readapt make the same vectors.

In: the config of the model that gives the weights, and the encoding. Out: config.json, the
tokenizer, readapt.json, and the modules of sentence-transformers, which it reads since version 2, as
do vLLM and text-embeddings-inference. A few kilobytes besides the tokenizer.
"""

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel
from readapt_ray.errors import InputError, ModelError
from readapt_ray.model_file_names import (
    CONFIG_NAME,
    CONTRACT_NAME,
    LENGTH_NAME,
    MODULES_NAME,
    POOLING_CONFIG_NAME,
    PROMPTS_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
)
from readapt_ray.storage import Location
from readapt_ray.weights.dense import copy_dense, modules_of
from readapt_ray.weights.tokenizer import write_tokenizer

logger = logging.getLogger("readapt_ray")

_POOLING_KEYS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
# We have none of these poolings, but text-embeddings-inference refuses a pooling config that leaves them out.
_OTHER_POOLING_KEYS = (
    "pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens",
)  # fmt: skip
# Options of transformers 4 for the rotary base in layers of full and of sliding attention, and whether it could scale
# the rotary embedding of the full ones (configuration_*.py of 4.57.6).
_LAYERED_ROPE: dict[str, tuple[tuple[str, ...], bool]] = {
    **dict.fromkeys(("gemma3_text", "gemma3n_text"), (("rope_theta", "rope_local_base_freq"), True)),
    **dict.fromkeys(("modernbert", "modernbert-decoder"), (("global_rope_theta", "local_rope_theta"), False)),
    "olmo3": (("rope_theta", "rope_theta"), True),
}
# `quantization_config` must go: the written weights are floating-point, even if the retriever was trained quantized.
_NOT_OF_RESULT = ("auto_map", "_name_or_path", "transformers_version", "quantization_config")
_TITLE, _TEXT = "\x00title\x00", "\x00text\x00"


def headless_config(config: Mapping[str, Any], *, dtype: str, name: str) -> dict[str, Any]:
    """Return the content of config.json for the model without its head, for transformers 4 and 5.

    Quantization options are left out, since the written weights are floating-point. A warning is logged if transformers
    4 cannot express the rotary embedding.

    Args:
        config: the config.json of the model that gives the weights.
        dtype: name of the weights' type.
        name: what the user calls that model; used in the error.

    Raises:
        ModelError: transformers has no headless class for this type of model.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    kind = config.get("model_type")
    known = MODEL_MAPPING_NAMES.get(kind)
    if known is None:
        raise ModelError(
            f"{name!r} has the model_type {kind!r} in config.json, which transformers' AutoModel does not know"
        )
    # The type under both names, since transformers before 4.56 reads only `torch_dtype`.
    kept = {key: value for key, value in config.items() if key not in _NOT_OF_RESULT}
    return {
        **_older_rope(config, name),
        **kept,
        "architectures": [known if isinstance(known, str) else known[0]],
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _older_rope(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the options of the rotary embedding in the form of transformers 4, for servers that still use it."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return {}
    if "rope_theta" in rope:
        return {"rope_theta": rope["rope_theta"], **_rope_scaling(rope)}
    full, sliding = (rope.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    keys, may_scale = _LAYERED_ROPE.get(str(config.get("model_type")), ((), False))
    older = dict(zip(keys, (full.get("rope_theta"), sliding.get("rope_theta")), strict=False)) | _rope_scaling(full)
    is_same = len(set(keys)) == 2 or full.get("rope_theta") == sliding.get("rope_theta")
    if not keys or not is_same or _rope_scaling(sliding) or (_rope_scaling(full) and not may_scale):
        logger.warning(
            "%s has other rotary settings for each kind of layer (rope_parameters in config.json), which no older option can "
            "say: give the result to servers with transformers 5 or newer alone, since older ones take defaults without a word",
            name,
        )
        return {}
    return older


def _rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {"rope_scaling": scaling} if scaling.get("rope_type", "default") != "default" else {}


def prompts(encoding: Encoding) -> dict[str, str]:
    """Turn the encoding's templates into sentence-transformers prompts: the text before a query and before a document.

    A template with words after the text cannot be a prompt and is left out.

    Returns:
        The prompts by kind, query and document: what the template has before title and text, "" if it has nothing.

    Raises:
        InputError: a template cannot be filled in.
    """
    found = {}
    for kind, template in (("query", encoding.query_template), ("document", encoding.passage_template)):
        try:
            filled = template.format(title=_TITLE, text=_TEXT, task=encoding.task)
        except (KeyError, IndexError, ValueError) as error:
            raise InputError(
                f"the template {template!r} cannot be filled in ({error!r}); it may hold {{title}}, {{text}} and {{task}}"
            ) from error
        if filled.endswith(_TEXT):
            found[kind] = filled.split("\x00", 1)[0]
    return found


def write_model_files(
    target: Location,
    *,
    config: Mapping[str, Any],
    tokenizer: Any,
    encoding: Encoding,
    contract: Mapping[str, Any],
    dense_of: OpenModel | None = None,
) -> None:
    """Write every file of a model folder except the weights and the model card.

    Args:
        target: the model folder. Files of the same name are replaced.
        config: the content of config.json, from `headless_config`. If it has no pad_token_id, the tokenizer's is added.
        tokenizer: the retriever's tokenizer, as transformers loads it.
        encoding: how text becomes a vector.
        contract: content of readapt.json besides the encoding.
        dense_of: the model whose Dense modules are copied with their weights; None copies none.

    Raises:
        ModelError: the tokenizer cannot be exported.
    """
    from transformers import AutoConfig

    if encoding.dimensions is not None:
        logger.warning(
            "no file of a model says that its vectors are cut: sentence-transformers gives all their numbers unless it is "
            "loaded with truncate_dim=%d, and so do other servers",
            encoding.dimensions,
        )
    with tempfile.TemporaryDirectory(prefix="readapt-export-") as name:
        folder = Path(name)
        _write_json(folder / CONFIG_NAME, config)
        write_tokenizer(tokenizer, encoding, folder)
        tokens = json.loads((folder / TOKENIZER_CONFIG_NAME).read_text(encoding="utf-8"))
        if config.get("pad_token_id") is None and tokens.get("pad_token") is not None:
            pad = json.loads((folder / TOKENIZER_NAME).read_text(encoding="utf-8"))["added_tokens"]
            ids = {each["content"]: each["id"] for each in pad}
            _write_json(folder / CONFIG_NAME, {**config, "pad_token_id": ids.get(tokens["pad_token"])})
        # transformers knows each family's name for the width (hidden_size, dim, n_embd).
        width = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False).hidden_size
        dense = copy_dense(dense_of, Location(str(folder))) if dense_of is not None else []
        _write_sentence_transformers(folder, encoding, int(width), dense)
        _write_json(folder / CONTRACT_NAME, {"encoding": encoding.model_dump(mode="json"), **contract})
        Location(str(folder)).copy_to(target)


def _write_sentence_transformers(folder: Path, encoding: Encoding, hidden_size: int, dense: list[str]) -> None:
    kinds = ["Transformer", "Pooling", *dense, *(["Normalize"] if encoding.normalize else [])]
    _write_json(folder / MODULES_NAME, modules_of(kinds))
    modes = {key: kind == encoding.pooling for kind, key in _POOLING_KEYS.items()}
    modes |= dict.fromkeys(_OTHER_POOLING_KEYS, False)
    # vLLM takes the first key that is true for the pooling, so include_prompt comes last.
    _write_json(
        folder / POOLING_CONFIG_NAME, {"word_embedding_dimension": hidden_size, **modes, "include_prompt": True}
    )
    if encoding.normalize:
        _write_json(folder / f"{len(kinds) - 1}_Normalize" / CONFIG_NAME, {})
    limit = max(encoding.max_query_tokens, encoding.max_passage_tokens)
    _write_json(folder / LENGTH_NAME, {"max_seq_length": limit, "do_lower_case": encoding.lower_case})
    similarity = "cosine" if encoding.normalize else "dot"
    _write_json(
        folder / PROMPTS_NAME,
        {"prompts": prompts(encoding), "default_prompt_name": None, "similarity_fn_name": similarity},
    )


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
