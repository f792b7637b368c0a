"""Check that a tuned model was made from a pretrained one, by their configs and tokenizers; no weight is read.

In: two models on this machine's disk. Out: nothing, or an error that lists what differs and names
the option that accepts it. Models with weights of equal shapes can still compute differently (rotary
embeddings, number of heads) or split text differently, and a merge of such models gives noise.
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
# Options that match the pattern above but do not matter: for training, or for a head, which is left out.
_MATTERS_NOT = re.compile(r"dropout|loss|_coef|router_jitter|classifier|normalize_logits|id2label|pruned_heads")
_PROBES = ("Hello, world! 1,234", "query: Ünïcode 数据 🙂", "two\nlines  and   spaces", "CamelCase_and-dashes")


def check_configs(pretrained: OpenModel, tuned: OpenModel) -> None:
    """Check that two models agree in the config options that decide what the weights compute.

    Options that a config.json leaves out have the defaults of transformers.

    Raises:
        WeightMismatchError: options differ; the error lists each with both values.
        ModelError: transformers cannot read a config.json.
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
    """Refuse knowledge that has the retrieval skill already, since that would be added twice.

    Args:
        retriever: the record of the retriever.
        knowledge: each knowledge model and its record.

    Raises:
        ModelError: a knowledge model is the retriever itself, or the output of a merge.
    """
    for model, source in knowledge:
        manifest = read_manifest(str(model.folder))
        is_merged = manifest is not None and manifest.stage == "merge"
        if is_merged or source.fingerprint == retriever.fingerprint:
            what = "a model that merge made" if is_merged else "the retriever"
            raise ModelError(
                f"the adapter {model.name!r} is {what}, and its retrieval skill would be added twice; give the output of "
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
    """Check that two models have the same token ids and split four sample texts into the same tokens.

    Nothing is checked if the folder of one of them has no tokenizer, as that of most adapters.

    Args:
        pretrained: the model before tuning.
        tuned: the model after tuning.
        accept_vocabulary: accept tokens that only one of them has. Tokens of both must still have the same ids.

    Raises:
        WeightMismatchError: the tokenizers differ; the error lists tokens and texts.
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
    """Check that each adapter is applied to the model that it was trained on.

    Adapters that `readapt train` or `readapt finetune` made record the fingerprint of their model. Other adapters
    record only a name, so a different name (after the last "/", in any case) is only logged as a warning.

    Args:
        pretrained: the model that the adapters are applied to.
        adapters: models to check; models with full weights are skipped.
        accept: accept an adapter that was trained on a model with another fingerprint.

    Raises:
        WeightMismatchError: an adapter was trained on a model with another fingerprint.
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
                    "%s says that it was trained on %s, and is applied to %s; make sure that they are the same model",
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
