"""Measure the language-model loss of texts before and after training, on one device, without Ray.

In: the pretrained model, the trained adapter or model, and texts that were withheld from training. Out: the loss per
token of each text, before and after. Memory is one model and the tokens of one text. It costs two forward passes per
text.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from readapt_ray.catalog.models import OpenModel
from readapt_ray.catalog.retrievers import Objective
from readapt_ray.training import objectives, packing
from readapt_ray.training.packing import Block, Masking
from readapt_ray.training.trainable import load_for_training
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.weight_files import Checkpoint


def losses(
    pretrained: OpenModel,
    trained: OpenModel,
    texts: Sequence[str],
    *,
    objective: Objective,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> NDArray[np.float64]:
    """Measure the mean loss per predicted token of each text in nats, float64 [2, N]: before and after training.

    For masked-token training, the same tokens are masked both times.

    Args:
        pretrained: the model before training.
        trained: the trained adapter, or a model with all weights trained.
        texts: N texts. A text without a token to predict gives NaN.
        objective: the objective of the training.
        max_tokens: maximum tokens of a text, as in training; longer ones are truncated.
        dtype: type of weights and computation.
        device: where to compute.
    """

    def load(source: OpenModel) -> Any:
        model = load_for_training(source, objective=objective, dtype=dtype, device=device, zero_stage=0)
        return model.eval().requires_grad_(False)

    tokenizer = pretrained.tokenizer
    ids, _ = packing.passage_ids(tokenizer, texts, max_tokens=max_tokens)
    masking = None
    if objective == "masked_lm":
        masking = Masking(mask_id=tokenizer.mask_token_id, vocab_size=len(tokenizer), seed=0)
    blocks = [Block(np.asarray(each, np.int32), (len(each),), (number,)) for number, each in enumerate(ids)]
    model = load(pretrained)
    before = _measured(model, blocks, masking, pad_id=packing.end_id(tokenizer) or 0)
    if trained.is_adapter:
        checkpoint = Checkpoint(pretrained.folder, name=pretrained.name)
        _add(model, checkpoint, Adapter(trained.folder, checkpoint, name=trained.name))
    else:
        model = load(trained)
    return np.stack([before, _measured(model, blocks, masking, pad_id=packing.end_id(tokenizer) or 0)])


@torch.no_grad()
def _measured(model: Any, blocks: Sequence[Block], masking: Masking | None, *, pad_id: int) -> NDArray[np.float64]:
    device = next(model.parameters()).device
    found = np.full(len(blocks), np.nan)
    for place, block in enumerate(blocks):
        if num_labels := block.num_labels(masking):
            batch = packing.collate([block], pad_id=pad_id, masking=masking).to(device)
            found[place] = float(objectives.loss_sum(model, batch)) / num_labels
    return found


@torch.no_grad()
def _add(model: Any, checkpoint: Checkpoint, adapter: Adapter) -> None:
    """Add an adapter's update to the weights of a model with its head, in float32."""
    parameters = dict(model.named_parameters())
    for name in adapter.names():
        weight_OI = checkpoint.read(name).float()
        parameter = parameters.get(f"{model.base_model_prefix}.{name}", parameters.get(name))
        assert parameter is not None  # Adapter refuses names that the checkpoint does not have
        parameter.copy_(weight_OI + adapter.factors(name).update(weight_OI))
