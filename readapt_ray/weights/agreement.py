"""Whether a model is still the one that it was made from: configs and tokenizers, compared before a weight is read.

In: two models on this machine's disk. Out: nothing, or an error that lists what differs and names
the option that settles it. Weights of equal shapes can belong to models that compute otherwise
(another rope, other heads) or read text otherwise, and a merge of those is noise.
"""

import logging
import re
from typing import Any

from readapt_ray.catalog.models import Model, load_tokenizer
from readapt_ray.errors import ModelError, WeightMismatchError
from readapt_ray.weights.adapter import listed

logger = logging.getLogger("readapt_ray")

# Options of a config that change what the weights compute.
_MATTERS = re.compile(
    r"^model_type$|rope|rotary|head|norm|eps$|_act$|activation|window|layer_types|hidden_layers|n_layer|hidden_size"
    r"|intermediate|position_embedding_type|causal|is_decoder|bidirectional|bias$|softcap|multiplier|scal|expert"
)
# Options of those names that do not: rules of training, and what a head that is dropped reads.
_MATTERS_NOT = re.compile(r"dropout|loss|_coef|router_jitter|classifier|normalize_logits|id2label|pruned_heads")
_PROBES = ("Hello, world! 1,234", "query: Ünïcode 数据 🙂", "two\nlines  and   spaces", "CamelCase_and-dashes")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


def check_configs(pretrained: Model, tuned: Model) -> None:
    """Compare what decides how weights are used, with each library default filled in.

    Raises:
        WeightMismatchError: options differ; each is listed with both values.
    """
    before, after = _options(pretrained), _options(tuned)
    differences = [
        f"{name}: {before.get(name)!r} before, {after.get(name)!r} after"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if differences:
        raise WeightMismatchError(
            f"the config of {tuned.name!r} is not that of {pretrained.name!r}: {listed(differences)}. Give the model that it "
            f"was made from; if the change is meant, --accept config takes the options of {tuned.name!r}"
        )


def _options(model: Model) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(model.folder), local_files_only=True, trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the config.json of {model.name!r} cannot be read by transformers: {first}") from error
    return {name: value for name, value in config.items() if _MATTERS.search(name) and not _MATTERS_NOT.search(name)}


def check_tokenizers(pretrained: Model, tuned: Model, *, accept_vocabulary: bool) -> None:
    """Compare the ids of all tokens, and how text is cut.

    Args:
        pretrained: the model before.
        tuned: the model after.
        accept_vocabulary: take tokens that only one of them has.

    Raises:
        WeightMismatchError: they differ; the tokens and texts are listed.
        ModelError: a tokenizer cannot be read.
    """
    for model in (pretrained, tuned):
        if not any((model.folder / name).is_file() for name in _TOKENIZER_FILES):
            logger.info("%s has no tokenizer of its own: there is nothing to compare", model.name)
            return
    if _same_file(pretrained, tuned):
        return
    one, other = load_tokenizer(pretrained), load_tokenizer(tuned)
    before, after = one.get_vocab(), other.get_vocab()
    moved = [
        f"token {token!r} is {before[token]} before, {after[token]} after"
        for token in sorted(before.keys() & after.keys(), key=lambda each: before[each])
        if before[token] != after[token]
    ]
    cut = []
    for probe in _PROBES:
        pieces = [each.tokenize(probe) for each in (one, other)]
        if pieces[0] != pieces[1]:
            cut.append(f"{probe!r} is cut into {pieces[0][:8]} before, {pieces[1][:8]} after")
    if moved or cut:
        raise WeightMismatchError(
            f"the tokenizer of {tuned.name!r} is not that of {pretrained.name!r}: {listed(moved + cut)}. Give the model that "
            f"it was made from; if the change is meant, --accept tokenizer takes that of {tuned.name!r}"
        )
    alone = [
        f"{token!r} ({vocabulary[token]}) only {when}"
        for vocabulary, lacking, when in ((before, after, "before"), (after, before, "after"))
        for token in sorted(vocabulary.keys() - lacking.keys(), key=lambda each: vocabulary[each])
    ]
    if alone and not accept_vocabulary:
        raise WeightMismatchError(
            f"the tokenizers of {pretrained.name!r} and {tuned.name!r} differ by {len(alone)} tokens: {listed(alone)}. "
            f"Give the model that it was made from, or --accept vocabulary to take the tokens of {tuned.name!r}"
        )


def _same_file(one: Model, other: Model) -> bool:
    files = [model.folder / "tokenizer.json" for model in (one, other)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()
