"""Translate the names of tensors in a model's files to the names of transformers' modules, and back.

Most families use one name for both. The families below use other names in their files, and store several weights as one
tensor: `encoder.layers.0.attn.Wqkv` of nomic_bert has the rows of `q_proj`, `k_proj` and `v_proj`, one after the other.
Adapters use the modules' names, so weights are read and summed under those. They are written under the stored names,
which every server of such a model can read. No weight is read here.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from readapt_ray.model_file_names import CONFIG_NAME

_QKV: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


class StoredWeights(NamedTuple):
    """A tensor in a file, and the weights whose rows it holds, in order."""

    name: str
    weights: tuple[str, ...]


@dataclass(frozen=True)
class NameTable:
    """The differences between names in a family's files and in its modules, as parts of names between dots."""

    renamed: Mapping[str, str]
    """From a part of a name in the files to the part that the modules have instead."""
    joined: Mapping[str, tuple[str, ...]]
    """From a part of the name of a tensor with several weights to the part that the modules have for each weight."""

    def weights_of(self, stored_name: str) -> tuple[str, ...]:
        """Return the module names of the weights that a stored tensor holds, in the order of its rows; mostly just one.

        `encoder.layers.0.attn.Wqkv.weight` of nomic_bert gives `layers.0.self_attn.q_proj.weight`, k_proj and v_proj.
        """
        name = f".{stored_name}"
        for stored, module in self.renamed.items():
            name = name.replace(f".{stored}.", f".{module}.")
        for stored, modules in self.joined.items():
            if f".{stored}." in name:
                return tuple(name.replace(f".{stored}.", f".{each}.")[1:] for each in modules)
        return (name[1:],)

    def stored(self, weights: Iterable[str]) -> list[StoredWeights]:
        """Return the tensors to store weights in, by the names in files; the inverse of `weights_of`.

        Weights are joined only if all weights of the tensor are given; else each is stored under its module name.

        Args:
            weights: module names. The tensors are in the order of their first weight.
        """
        there = dict.fromkeys(weights)
        found: dict[str, tuple[str, ...]] = {}
        for weight in there:
            name, parts = self._stored_name(weight)
            if all(each in there for each in parts):
                found[name] = parts
            else:
                found[weight] = (weight,)
        return [StoredWeights(name, parts) for name, parts in found.items()]

    def _stored_name(self, weight: str) -> tuple[str, tuple[str, ...]]:
        """Return the name of the stored tensor that holds a weight, and all weights in that tensor."""
        whole = f".{weight}"
        parts: tuple[str, ...] = (weight,)
        for stored, modules in self.joined.items():
            own = next((each for each in modules if f".{each}." in whole), None)
            if own is not None:
                parts = tuple(whole.replace(f".{own}.", f".{each}.")[1:] for each in modules)
                whole = whole.replace(f".{own}.", f".{stored}.")
                break
        for stored, module in self.renamed.items():
            whole = whole.replace(f".{module}.", f".{stored}.")
        return whole[1:], parts


_NORMS: Final = {"norm1": "post_attention_layernorm", "norm2": "post_mlp_layernorm"}
_TABLES: Final = {
    "nomic_bert": NameTable(
        renamed={
            "emb_ln": "embeddings.LayerNorm",
            "encoder.layers": "layers",
            "attn.out_proj": "self_attn.o_proj",
            "mlp.fc11": "mlp.up_proj",
            "mlp.fc12": "mlp.gate_proj",
            "mlp.fc2": "mlp.down_proj",
            **_NORMS,
        },
        joined={"attn.Wqkv": _QKV},
    ),
    "jina_embeddings_v3": NameTable(
        renamed={
            "emb_ln": "embeddings.LayerNorm",
            "encoder.layers": "layers",
            "mixer.out_proj": "self_attn.o_proj",
            **_NORMS,
        },
        joined={"mixer.Wqkv": _QKV},
    ),
    "gte": NameTable(
        renamed={
            "encoder.layer": "layers",
            "attention.o_proj": "self_attn.o_proj",
            "attn_ln": "post_attention_layernorm",
            "mlp_ln": "post_mlp_layernorm",
            "lm_head.norm": "lm_head.layer_norm",
        },
        joined={"attention.qkv_proj": _QKV, "mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj")},
    ),
}
"""Tables by `model_type`, from conversion_mapping.py of transformers 5.23; its save_pretrained writes these names."""
_SAME: Final = NameTable(renamed={}, joined={})


def table_of(model_type: object) -> NameTable:
    """Return the name table of a model family; for most families it changes no name."""
    return _TABLES.get(str(model_type), _SAME)


def table_in(folder: Path) -> NameTable:
    """Return the name table for the model in a folder, by the model_type in its config.json.

    If config.json is missing or cannot be read, it is the table that changes no name.
    """
    try:
        return table_of(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError):
        return _SAME  # whoever needs the config later raises a better error
