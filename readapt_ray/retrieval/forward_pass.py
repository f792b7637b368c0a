"""From token ids to one pooled vector a text: a batch through the model, padded or packed.

Padded, each text is a row with padding on its right. Packed, all texts are concatenated in one row, and
attention keeps them apart (attention.py); no position is computed in vain.
"""

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from readapt_ray.catalog.encoding import Pooling
from readapt_ray.catalog.shapes import first_position
from readapt_ray.errors import ModelError
from readapt_ray.nn import attention, norms, packed_linear
from readapt_ray.nn.transfer import to_device
from readapt_ray.retrieval.pooling import normalized, pool, pool_packed

logger = logging.getLogger("readapt_ray")

_ALIKE = 0.995
"""Least cosine of a packed vector and a padded one in bfloat16; mixed-up texts give far less."""


def padded_inputs(
    rows: Sequence[Sequence[int] | np.ndarray], width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ids and mask, both [B, width], with each text a row that is padded on the right."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
        # Attention multiplies padding by 0, which is NaN where it overflows: a text pads itself, so only its own
        # vector can suffer.
        row[len(tokens) :] = tokens[-1]
    return ids, (np.arange(width) < lengths[:, None]).astype(np.int64)


def packed_inputs(
    rows: Sequence[Sequence[int] | np.ndarray],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Return ids and positions from 0 of all texts in one row, both [1, T], and where texts begin and end, [B + 1]."""
    lengths = [len(row) for row in rows]
    ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    return ids, positions, np.cumsum([0, *lengths], dtype=np.int32)


def check_ids(highest: int, num_embeddings: int) -> None:
    """Refuse token ids that a model does not know.

    Raises:
        ModelError: the highest one is over its token embeddings.
    """
    if highest >= num_embeddings:
        raise ModelError(
            f"the tokenizer gives the id {highest}, but the model has {num_embeddings} token embeddings; "
            f"take the tokenizer that belongs to the model"
        )


class ForwardPass:
    """A model and how its hidden states become a vector.

    Args:
        network: headless transformers model in eval mode, on its device.
        pooling: which hidden states become the vector.
    """

    def __init__(self, network: Any, pooling: Pooling) -> None:
        self.network = network
        self.device = next(network.parameters()).device
        if self.device.type == "cuda":
            norms.fuse(network)
        else:
            packed_linear.install(network)
        self.first_position = first_position(network)
        self.is_packed = False
        self._pooling = pooling
        self._accepted = frozenset(inspect.signature(network.forward).parameters)
        self._num_embeddings = int(network.get_input_embeddings().num_embeddings)

    def pooled(self, rows: Sequence[Sequence[int] | np.ndarray]) -> torch.Tensor:
        """Return the vectors of B texts' token ids, on the device: float32 [B, H].

        Raises:
            ModelError: an id is over the model's token embeddings.
        """
        return (self._packed if self.is_packed else self._padded)(rows)

    def pack(self) -> bool:
        """Lay texts end to end from now on; False, and nothing changed, where that gives other vectors: it is tried."""
        if "position_ids" not in self._accepted:
            return False
        rows = [[1, 2, 3], [3, 2, 1, 2, 3, 1, 2], [2], [3, 1, 2, 2, 1]]
        before = self.network.config._attn_implementation
        with torch.inference_mode():
            padded = normalized(self._padded(rows))
            try:
                attention.install(self.network, "this model")
                alike = bool((normalized(self._packed(rows)) * padded).sum(dim=1).min() > _ALIKE)
            except (ModelError, TypeError, ValueError, RuntimeError, ImportError) as error:
                logger.info("this model is not packed: %s", error)
                alike = False
        if not alike:
            self.network.set_attn_implementation(before)
        self.is_packed = alike
        return alike

    def _padded(self, rows: Sequence[Sequence[int] | np.ndarray]) -> torch.Tensor:
        """Return pooled vectors [B, H], with each text a row that is padded on the right."""
        ids, mask_BT = padded_inputs(rows, max(map(len, rows)))
        mask = to_device(mask_BT, self.device)
        hidden = self._hidden(ids, np.broadcast_to(np.arange(ids.shape[1]), ids.shape), attention_mask=mask)
        return pool(hidden, mask, self._pooling)

    def _packed(self, rows: Sequence[Sequence[int] | np.ndarray]) -> torch.Tensor:
        """Return pooled vectors [B, H], with all texts in one row."""
        lengths = [len(row) for row in rows]
        ids, positions, ends = packed_inputs(rows)
        hidden = self._hidden(ids, positions, cu_seq_lens_q=to_device(ends, self.device), max_length_q=max(lengths))
        return pool_packed(hidden[0], lengths, self._pooling)

    def _hidden(self, ids: np.ndarray, positions: np.ndarray, **more: Any) -> torch.Tensor:
        """Return the last hidden states [B, T, H]; `more` goes to the attention."""
        check_ids(int(ids.max()), self._num_embeddings)
        given = {
            "input_ids": to_device(ids, self.device),
            "position_ids": to_device(positions + self.first_position, self.device),
            "use_cache": False,
        }
        output = self.network(**{name: value for name, value in given.items() if name in self._accepted}, **more)
        return output.last_hidden_state  # type: ignore[no-any-return]
