"""Run a batch of token ids through the model, padded or packed, and pool one vector per text.

Padded: each text is a row with padding on its right. Packed: all texts are concatenated in one row without padding, and
attention stays within each text (`nn/attention.py`).
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
"""Least cosine of the packed and the padded vector of a text, in bfloat16. If texts mix, it is far less."""


def padded_inputs(
    rows: Sequence[Sequence[int] | np.ndarray], width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pad texts on the right: return ids and mask (1 for tokens, 0 for padding), both int64 [B, width].

    Padding repeats the last token of the text.

    Args:
        rows: token ids of each text, at least one.
        width: at least the length of the longest text.
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
        # Attention multiplies padding by 0, which gives NaN if a value overflows. Padding with a token of the text itself
        # means that only its own vector can be affected.
        row[len(tokens) :] = tokens[-1]
    return ids, (np.arange(width) < lengths[:, None]).astype(np.int64)


def packed_inputs(
    rows: Sequence[Sequence[int] | np.ndarray],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Concatenate texts in one row: return ids and positions, both [1, T], and the offsets of the texts, [B + 1].

    Positions start at 0 in each text. Two texts of 2 and 3 tokens have the offsets 0, 2, 5.
    """
    lengths = [len(row) for row in rows]
    ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    return ids, positions, np.cumsum([0, *lengths], dtype=np.int32)


def check_ids(highest: int, num_embeddings: int) -> None:
    """Refuse token ids that a model does not know.

    Args:
        highest: the highest id of the texts.
        num_embeddings: number of the model's token embeddings.

    Raises:
        ModelError: the highest id is not below the number of token embeddings.
    """
    if highest >= num_embeddings:
        raise ModelError(
            f"the tokenizer gives the id {highest}, but the model has {num_embeddings} token embeddings; "
            f"take the tokenizer that belongs to the model"
        )


class ForwardPass:
    """A model that turns a batch of token ids into one pooled vector per text, padded until `pack` is called.

    The network is changed in place: on a GPU its norms are fused, on a CPU linear layers are packed where that is
    faster.

    Args:
        network: headless transformers model in eval mode, on its device.
        pooling: how hidden states become the vector: last, mean or cls.
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
        """Compute the vectors of B texts from their token ids: float32 [B, H], on the device, not normalised.

        Args:
            rows: token ids of each text, at least one per text.

        Raises:
            ModelError: the model has no embedding for a token id.
        """
        return (self._packed if self.is_packed else self._padded)(rows)

    def pack(self) -> bool:
        """Pack texts from now on if a trial gives the same vectors as padding; return whether it does.

        If it does not, or the model cannot be packed, texts are padded as before.
        """
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
        """Return pooled vectors [B, H] of texts that are padded on the right."""
        ids, mask_BT = padded_inputs(rows, max(map(len, rows)))
        mask = to_device(mask_BT, self.device)
        hidden = self._hidden(ids, np.broadcast_to(np.arange(ids.shape[1]), ids.shape), attention_mask=mask)
        return pool(hidden, mask, self._pooling)

    def _packed(self, rows: Sequence[Sequence[int] | np.ndarray]) -> torch.Tensor:
        """Return pooled vectors [B, H] of texts that are packed in one row."""
        lengths = [len(row) for row in rows]
        ids, positions, ends = packed_inputs(rows)
        hidden = self._hidden(ids, positions, cu_seq_lens_q=to_device(ends, self.device), max_length_q=max(lengths))
        return pool_packed(hidden[0], lengths, self._pooling)

    def _hidden(self, ids: np.ndarray, positions: np.ndarray, **more: Any) -> torch.Tensor:
        """Return the last hidden states [B, T, H]; `more` is passed on to the attention."""
        check_ids(int(ids.max()), self._num_embeddings)
        given = {
            "input_ids": to_device(ids, self.device),
            "position_ids": to_device(positions + self.first_position, self.device),
            "use_cache": False,
        }
        output = self.network(**{name: value for name, value in given.items() if name in self._accepted}, **more)
        return output.last_hidden_state  # type: ignore[no-any-return]
