"""Check that the weights of two models can be subtracted: the same tensors, in the same shapes, and floating-point.

In: checkpoints, of which only headers are read. Out: nothing, or an error that lists the tensors that do not fit.
"""

import logging
import re

import torch

from readapt_ray.catalog.models import OpenModel
from readapt_ray.errors import ModelError, WeightMismatchError
from readapt_ray.model_file_names import TOKENIZER_FILES
from readapt_ray.weights.adapter import listed
from readapt_ray.weights.weight_files import Checkpoint, natural_order

logger = logging.getLogger("readapt_ray")

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# BERT-like models have a pooler that none of our poolings reads. If one model lacks it, the other's is kept.
_UNUSED_PREFIX = "pooler."
_VOCABULARY = re.compile(r"(embed_tokens|word_embeddings|wte|embed_in|tok_embeddings)\.weight$")


def check_floating(checkpoint: Checkpoint) -> None:
    """Refuse a model with quantised weights: integers or float8. Headers say the types; no weight is read.

    Raises:
        ModelError: tensors are not floating-point; the error lists them.
    """
    wrong = [
        f"{name}: {checkpoint.dtype(name)}" for name in checkpoint.names() if checkpoint.dtype(name) not in _FLOATS
    ]
    if wrong:
        raise ModelError(
            f"{checkpoint.name!r} is quantised ({listed(wrong)}); give its weights in float32, float16 or bfloat16"
        )


def check_embeddings(checkpoint: Checkpoint) -> None:
    """Refuse a model that stores its tied word embeddings only as the LM head, since heads are left out.

    Raises:
        ModelError: the model has a head and no word embeddings.
    """
    if checkpoint.heads and not any(_VOCABULARY.search(name) for name in checkpoint.names()):
        raise ModelError(
            f"{checkpoint.name!r} holds a head ({checkpoint.heads[0]}) but no word embeddings; load it once with transformers "
            f"and save_pretrained it, which stores tied embeddings under their own name"
        )


def _is_padding(pretrained: Checkpoint, tuned: Checkpoint, name: str) -> bool:
    """Return whether the extra rows of the larger word embeddings belong to no token (a vocabulary rounded up)."""
    rows = [each.shape(name)[0] for each in (pretrained, tuned)]
    models = [OpenModel(name=each.name, folder=each.folder) for each in (pretrained, tuned)]
    with_tokenizer = [each for each in models if any((each.folder / file).is_file() for file in TOKENIZER_FILES)]
    highest = max((max(each.tokenizer.get_vocab().values()) for each in with_tokenizer), default=min(rows))
    if highest >= min(rows):
        return False
    logger.info(
        "%s has %d word embeddings and %s %d: no token has one of the rows from %d on, so they are padding; those of the "
        "retriever are kept",
        *(pretrained.name, rows[0], tuned.name, rows[1], min(rows)),
    )
    return True


def check_partners(
    pretrained: Checkpoint, tuned: Checkpoint, *, accept_vocabulary: bool, may_pad: bool = False
) -> tuple[str, ...]:
    """Check that a model has the same tensors, in the same shapes, before and after tuning.

    Args:
        pretrained: the model before tuning.
        tuned: the model after tuning.
        accept_vocabulary: accept another number of word embeddings.
        may_pad: accept another number of word embeddings if the rows that one model lacks belong to no token, by the
            tokenizers in the folders.

    Returns:
        The names of the tensors that only one model has and that change no vector (a pooler), sorted; mostly none.

    Raises:
        WeightMismatchError: tensors are missing in one model or have other shapes; the error lists them.
    """
    only_one = {*pretrained.names()} ^ {*tuned.names()}
    carried = {name for name in only_one if name.startswith(_UNUSED_PREFIX)}
    problems = [
        f"{name}: only in {(pretrained if name in pretrained else tuned).name!r}"
        for name in sorted(only_one - carried, key=natural_order)
    ]
    only_words = not problems
    for name in pretrained.names():
        if name not in tuned or pretrained.shape(name) == tuned.shape(name):
            continue
        before, after = pretrained.shape(name), tuned.shape(name)
        is_vocabulary = bool(_VOCABULARY.search(name)) and before[1:] == after[1:]
        if is_vocabulary and may_pad and _is_padding(pretrained, tuned, name):
            continue
        if not (is_vocabulary and accept_vocabulary):
            problems.append(f"{name}: {list(before)} before, {list(after)} after")
            only_words = only_words and is_vocabulary
    if not problems:
        return tuple(sorted(carried))
    if only_words:
        raise WeightMismatchError(
            f"vocabulary sizes of {tuned.name!r} and {pretrained.name!r} differ: {listed(problems)}. If the tokens that both "
            f"have are the same, --accept vocabulary keeps the new ones as they are and drops those that it lacks"
        )
    raise WeightMismatchError(
        f"{tuned.name!r} was not made from {pretrained.name!r}: {listed(problems)}. Give as pretrained the very "
        f"model that it was trained from (the base_model of its model card, with the same vocabulary)"
    )
