"""Read the encoding of a retriever from the files of sentence-transformers in its folder.

In: a folder with `modules.json`, and its tokenizer. Out: the `Encoding` with which rankings equal those of
sentence-transformers. Vectors equal too, but those that are compared by cosine always have length 1 here. A feature
that no `Encoding` can express is refused, with its name.
"""

import functools
import logging
from collections.abc import Mapping
from typing import Any

from readapt_ray.catalog.dense_layers import check_reads_vector, dense_layers, read_modules
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.likely_encoding import usable_positions
from readapt_ray.catalog.model_folder import ModelFolder
from readapt_ray.catalog.special_tokens import added_by_itself, only_token
from readapt_ray.errors import ModelError
from readapt_ray.model_file_names import MODULES_NAME, PROMPTS_NAME

logger = logging.getLogger("readapt_ray")

_POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_QUERY_PROMPTS = ("query",)
_PASSAGE_PROMPTS = ("document", "passage", "corpus")
# Names that releases before 3 wrote, by the kind of model; the first that exists is read.
_SETTINGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


def read_encoding(model: ModelFolder, tokenizer: Any, tokenizer_config: Mapping[str, Any]) -> Encoding:
    """Return the encoding that the files of sentence-transformers describe.

    Without prompts for queries or passages, the default prompt is used for both, or none if there is no default. Logs a
    warning, once per model, if the last token is pooled and the tokenizer adds no token at the end.

    Args:
        model: a folder with `modules.json`.
        tokenizer: tokenizer of the model, as transformers loads it.
        tokenizer_config: content of tokenizer_config.json, since some releases of transformers ignore its BOS or EOS.

    Raises:
        ModelError: an encoding cannot express its modules, pooling, prompts or special tokens.
    """
    modules = read_modules(model)
    kinds = [kind for kind, _ in modules]
    layers = kinds[2:-1] if kinds[-1] == "Normalize" else kinds[2:]
    if kinds[:2] != ["Transformer", "Pooling"] or set(layers) - {"Dense"}:
        raise ModelError(
            f"{model.name!r} has the modules {kinds}; understood are Transformer, Pooling, Dense and Normalize, in this order"
        )
    dense_layers(model)
    for kind, path in modules:
        if kind == "Normalize":
            check_reads_vector(model, path, model.read_json(f"{path}/config.json"))
    pooling = _pooling_config(model, modules[1][1])
    settings = next((found for found in map(model.read_json, _SETTINGS) if found), {})
    encoder = model.read_json(PROMPTS_NAME)
    limit = int(settings.get("max_seq_length") or _longest_text(model, tokenizer))
    before, after = (only_token(tokens) for tokens in added_by_itself(tokenizer))
    query, passage = _prompts(model, encoder, pooling)
    similarity = _similarity(model, encoder)
    encoding = Encoding.parse(
        {
            "query_template": _braced(query) + "{text}",
            "passage_template": _braced(passage) + "{title} {text}",
            "pooling": _pooling(model, pooling),
            "normalize": "Normalize" in kinds or similarity != "dot",
            "add_bos": before is not None or tokenizer_config.get("add_bos_token") is True,
            "add_eos": after is not None or tokenizer_config.get("add_eos_token") is True,
            "max_query_tokens": limit,
            "max_passage_tokens": limit,
            "lower_case": bool(settings.get("do_lower_case")),
        },
        where=str(model.folder),
    )
    if encoding.pooling == "last" and not encoding.add_eos:
        _warn_of_no_end(model.name)
    return encoding


@functools.cache
def _warn_of_no_end(name: str) -> None:
    """Warn once per process and model, since several places read the encoding."""
    logger.warning(
        "%s pools the last token, and its tokenizer puts no special token behind a text; if it was trained with one, give "
        "--encoding FILE.json with add_eos true",
        name,
    )


def _prompts(model: ModelFolder, encoder: Mapping[str, Any], pooling: Mapping[str, Any]) -> tuple[str, str]:
    """Return the prompts that sentence-transformers puts before a query and before a passage."""
    given = {name: prompt for name, prompt in (encoder.get("prompts") or {}).items() if prompt is not None}
    default = encoder.get("default_prompt_name")
    if pooling.get("include_prompt") is False and any(given.values()):
        raise ModelError(
            f"{model.name!r} pools without the tokens of its prompt (include_prompt); that is not understood"
        )
    if any(given.values()) and default is None and not given.keys() & {*_QUERY_PROMPTS, *_PASSAGE_PROMPTS}:
        raise ModelError(
            f"{model.name!r} has the prompts {', '.join(given)}, and nothing says which of them is for queries and which "
            f"for passages; give --encoding FILE.json with query_template and passage_template"
        )
    query, passage = (
        str(given.get(next((each for each in names if each in given), default), ""))
        for names in (_QUERY_PROMPTS, _PASSAGE_PROMPTS)
    )
    return query, passage


def _braced(prompt: str) -> str:
    return prompt.replace("{", "{{").replace("}", "}}")


def _similarity(model: ModelFolder, encoder: Mapping[str, Any]) -> str:
    similarity = encoder.get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        raise ModelError(f"{model.name!r} compares vectors by {similarity!r}; understood are cosine and dot")
    return str(similarity)


def _longest_text(model: ModelFolder, tokenizer: Any) -> int:
    """Return the maximum tokens as sentence-transformers does: the lower limit of tokenizer and model."""
    return min(int(tokenizer.model_max_length), usable_positions(model.config))


def _pooling_config(model: ModelFolder, path: str) -> dict[str, Any]:
    if not (model.folder / path / "config.json").is_file():
        raise ModelError(
            f"{path}/config.json is missing in {model.folder}, though {MODULES_NAME} names {path!r}: copy or fetch the "
            f"whole folder of {model.name!r} again, or give --encoding FILE.json with its pooling"
        )
    return model.read_json(f"{path}/config.json")


def _pooling(model: ModelFolder, config: Mapping[str, Any]) -> str:
    chosen = _pooling_modes(config) or ["mean"]  # the default of sentence-transformers if no mode is on
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise ModelError(f"{model.name!r} uses pooling {chosen}; supported is one of {sorted(_POOLINGS)}")
    return _POOLINGS[chosen[0]]


def _pooling_modes(config: Mapping[str, Any]) -> list[str]:
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        return [mode] if isinstance(mode, str) else list(mode)
    prefix = "pooling_mode_"
    return [
        name.removeprefix(prefix).removesuffix("_tokens").removesuffix("_token")
        for name, on in config.items()
        if name.startswith(prefix) and on
    ]
