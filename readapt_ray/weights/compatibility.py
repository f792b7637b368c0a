"""Check that a model still is the one that it was made from: compare configs and tokenizers, read no weight.

In: two models on this machine's disk. Out: nothing, or an error that lists what differs and names
the option that settles it. Weights of equal shapes can belong to models that compute otherwise
(another rope, other heads) or read text otherwise, and a merge of those is noise.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

from readapt_ray.artifacts import read_manifest
from readapt_ray.catalog.models import OpenModel
from readapt_ray.errors import ModelError, WeightMismatchError, first_line
from readapt_ray.model_file_names import TOKENIZER_FILES
from readapt_ray.progress import amount
from readapt_ray.weights.adapter import listed
from readapt_ray.weights.provenance import MergeInput

logger = logging.getLogger("readapt_ray")

# Options of a config that change what the weights compute.
_MATTERS = re.compile(
    r"^model_type$|rope|rotary|head|norm|eps$|_act$|activation|window|layer_types|hidden_layers|n_layer|hidden_size"
    r"|intermediate|position_embedding_type|causal|is_decoder|bidirectional|bias$|softcap|multiplier|scal|expert"
)
# Options of those names that do not: rules of training, and what a head that is dropped reads.
_MATTERS_NOT = re.compile(r"dropout|loss|_coef|router_jitter|classifier|normalize_logits|id2label|pruned_heads")
_PROBES = ("Hello, world! 1,234", "query: Ünïcode 数据 🙂", "two\nlines  and   spaces", "CamelCase_and-dashes")


def check_configs(pretrained: OpenModel, tuned: OpenModel) -> None:
    """Compare the configs that decide how weights are used, with library defaults filled in.

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
            f"the config of {tuned.name!r} differs from the one of {pretrained.name!r}: {listed(differences)}. Give the model that it "
            f"was made from; if the change is meant, --accept config takes the options of {tuned.name!r}"
        )


def check_knowledge(retriever: MergeInput, knowledge: Sequence[tuple[OpenModel, MergeInput]]) -> None:
    """Refuse as knowledge a model that holds retrieval skill: it would be added twice.

    Raises:
        ModelError: it is the retriever itself, or the output of a merge.
    """
    for model, source in knowledge:
        manifest = read_manifest(str(model.folder))
        is_merged = manifest is not None and manifest.stage == "merge"
        if is_merged or source.fingerprint == retriever.fingerprint:
            what = "a model that merge made" if is_merged else "the retriever"
            raise ModelError(
                f"the adapter {model.name!r} is {what}, and its retrieval skill would be laid on twice; give the output of "
                f"`readapt train`"
            )


def _options(model: OpenModel) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(model.folder), local_files_only=True, trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the config.json of {model.name!r} cannot be read by transformers: {first_line(error)}"
        ) from error
    return {name: value for name, value in config.items() if _MATTERS.search(name) and not _MATTERS_NOT.search(name)}


def check_tokenizers(pretrained: OpenModel, tuned: OpenModel, *, accept_vocabulary: bool) -> None:
    """Compare the ids of all tokens, and how text is split.

    Args:
        pretrained: the model before.
        tuned: the model after.
        accept_vocabulary: take tokens that only one of them has.

    Raises:
        WeightMismatchError: they differ; the tokens and texts are listed.
        ModelError: a tokenizer cannot be read.
    """
    for model in (pretrained, tuned):
        if not any((model.folder / name).is_file() for name in TOKENIZER_FILES):
            if not model.is_adapter:
                logger.info("%s has no tokenizer of its own: there is nothing to compare", model.name)
            return
    if _same_file(pretrained, tuned):
        return
    one, other = pretrained.tokenizer, tuned.tokenizer
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
            f"the tokenizer of {tuned.name!r} differs from the one of {pretrained.name!r}: {listed(moved + cut)}. Give the model that "
            f"it was made from; if the change is meant, --accept tokenizer takes the one of {tuned.name!r}"
        )
    alone = [
        f"{token!r} ({vocabulary[token]}) only {when}"
        for vocabulary, lacking, when in ((before, after, "before"), (after, before, "after"))
        for token in sorted(vocabulary.keys() - lacking.keys(), key=lambda each: vocabulary[each])
    ]
    if alone and not accept_vocabulary:
        raise WeightMismatchError(
            f"the tokenizers of {pretrained.name!r} and {tuned.name!r} differ by {amount(len(alone), 'tokens')}: {listed(alone)}. "
            f"Give the model that it was made from, or --accept vocabulary to take the tokens of {tuned.name!r}"
        )


def check_bases(pretrained: MergeInput | OpenModel, adapters: Sequence[OpenModel], *, accept: bool) -> None:
    """Compare the model that each adapter was trained on with the one that it is applied to.

    What `readapt train` and `readapt finetune` made says it by fingerprint; other adapters give a name, and another name is
    only a warning.

    Args:
        pretrained: what they are laid on.
        adapters: models; those that are no adapters are left out.
        accept: take an adapter that was trained on another model.

    Raises:
        WeightMismatchError: an adapter was trained on another model.
    """
    for adapter in adapters:
        if not adapter.is_adapter:
            continue
        named = str(adapter.adapter_config.get("base_model_name_or_path") or "")
        manifest = read_manifest(str(adapter.folder))
        inputs = manifest.inputs if manifest is not None else {}
        trained_on = inputs.get("pretrained") or inputs.get("model")
        if trained_on is None:
            if _last(named) not in ("", _last(pretrained.name)):
                logger.warning(
                    "%s says that it was trained on %s, and is laid on %s; make sure that they are the same model",
                    adapter.name,
                    named,
                    pretrained.name,
                )
        elif trained_on != pretrained.fingerprint and not accept:
            raise WeightMismatchError(
                f"the adapter {adapter.name!r} was trained on {named!r} with the fingerprint {trained_on}, and "
                f"{pretrained.name!r} has {pretrained.fingerprint}: a file of it changed, or it is another model. Give the "
                f"model that it was trained on; if the change is meant, --accept base lays it on this one"
            )


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def _same_file(one: OpenModel, other: OpenModel) -> bool:
    files = [model.folder / "tokenizer.json" for model in (one, other)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()
