"""What a model costs: parameters, FLOPs a token, widths. From its config alone; no weight is read.

The configs of the catalog's hub models stand here, so that a plan needs no network and no licence.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from readapt_ray.catalog import models, retrievers
from readapt_ray.catalog.model_folder import ADAPTER_CONFIG_NAME
from readapt_ray.errors import ModelError
from readapt_ray.storage import Location

_MISTRAL: Final[dict[str, Any]] = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
_BERT: Final[dict[str, Any]] = {"model_type": "bert", "vocab_size": 21128}


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }


CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "mistralai/Mistral-7B-v0.1": _MISTRAL,
    "meta-llama/Llama-2-7b-hf": {
        **_MISTRAL,
        "model_type": "llama",
        "intermediate_size": 11008,
        "num_key_value_heads": 32,
    },
    "Qwen/Qwen3-0.6B-Base": _qwen3(1024, 3072, 28, 16),
    "Qwen/Qwen3-4B-Base": _qwen3(2560, 9728, 36, 32),
    "Qwen/Qwen3-8B-Base": _qwen3(4096, 12288, 36, 32),
    "hfl/chinese-roberta-wwm-ext": _BERT,
    "FacebookAI/xlm-roberta-base": {"model_type": "xlm-roberta", "vocab_size": 250002},
    "nreimers/MiniLM-L6-H384-uncased": {
        **_BERT,
        "vocab_size": 30522,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    },
}
"""config.json of hub models, as far as it decides their cost (from their published config.json)."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What decides a model's cost."""

    name: str
    hidden: int
    intermediate: int
    num_layers: int
    attention_width: int
    """Heads times the width of one."""
    vocabulary: int
    is_causal: bool
    num_parameters: int
    """Without a language-model head."""
    num_embedding_parameters: int
    linears: tuple[tuple[str, int, int], ...]
    """Every linear layer: the last part of its name, inputs, outputs."""
    targets: tuple[str, ...]
    """The layers that get an adapter where the options name none."""

    @property
    def matrix_parameters(self) -> int:
        """Parameters that each token is multiplied with."""
        return self.num_parameters - self.num_embedding_parameters

    def forward_flops(self, tokens: float) -> float:
        """FLOPs a token of one forward pass over passages of so many tokens, without the head.

        Two a parameter, and the two products of attention over the tokens seen (half of them where it is causal).
        """
        seen = tokens / 2 if self.is_causal else tokens
        return 2 * self.matrix_parameters + 4 * self.num_layers * self.attention_width * seen

    def head_flops(self) -> float:
        """FLOPs a token of the language-model head, forward."""
        return 2.0 * self.hidden * self.vocabulary

    def adapted(self, targets: tuple[str, ...]) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers whose names end with one of the targets; of the family's where there are none."""
        return [(inputs, outputs) for name, inputs, outputs in self.linears if name.endswith(targets or self.targets)]

    def adapter_parameters(self, targets: tuple[str, ...], rank: int) -> int:
        """Trained numbers of a DoRA adapter: A, B and the magnitudes."""
        return sum(rank * (inputs + outputs) + outputs for inputs, outputs in self.adapted(targets))


def model_shape(name: str) -> ModelShape:
    """The shape of a MODEL: a catalog name, a folder, a URI or a hub id.

    Raises:
        ModelError: there is none of that name, or transformers does not know its kind.
    """
    config = _config(name)
    if not config.get("model_type"):
        raise ModelError(f"{name!r} has no model_type in its config.json, so what it costs cannot be told")
    return _shape(name, config)


def _config(name: str) -> dict[str, Any]:
    row = retrievers.find_retriever(name)
    target = row.pretrained if row else retrievers.hub_id(name)
    if target in CONFIGS:
        return CONFIGS[target]
    if "://" in target:
        return _remote_config(name, Location(target))
    if retrievers.hub_id(target).startswith("builtin:") or Path(target).expanduser().is_dir():
        model = models.find_model(target)
        return (model.base() if model.is_adapter else model).read_json("config.json")
    return _hub_config(name, target)


def _remote_config(name: str, folder: Location) -> dict[str, Any]:
    for file in ("config.json", ADAPTER_CONFIG_NAME):
        if (folder / file).is_file():
            values: dict[str, Any] = json.loads((folder / file).read_text())
            return values if file == "config.json" else _config(str(values["base_model_name_or_path"]))
    raise ModelError(f"{name!r} is not a model: {folder} has neither config.json nor {ADAPTER_CONFIG_NAME}")


def _hub_config(name: str, hub_id: str) -> dict[str, Any]:
    """Only config.json is fetched, not the weights."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return dict(json.loads(Path(hf_hub_download(hub_id, "config.json")).read_text(encoding="utf-8")))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        known = ", ".join(row.name for row in retrievers.RETRIEVERS)
        raise ModelError(
            f"what {name!r} costs cannot be told: its config.json is neither in a folder of that name nor on the hub "
            f"({type(error).__name__}); give a local folder with config.json, or a model of the catalog ({known})"
        ) from error


def _shape(name: str, values: dict[str, Any]) -> ModelShape:
    import torch
    from transformers import AutoConfig, AutoModel

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        try:
            config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModel.from_config(config)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"transformers cannot make {name!r} from its config.json: {error}") from error
    linears = tuple(
        (path, int(layer.in_features), int(layer.out_features))
        for path, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    )
    embeddings = [layer for layer in model.modules() if isinstance(layer, torch.nn.Embedding)]
    heads = int(config.num_attention_heads)
    return ModelShape(
        name=name,
        hidden=int(config.hidden_size),
        intermediate=int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size),
        num_layers=int(config.num_hidden_layers),
        attention_width=heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocabulary=int(config.vocab_size),
        is_causal=not any(path.endswith(retrievers.BERT_TARGETS[0]) for path, _, _ in linears),
        num_parameters=sum(each.numel() for each in model.parameters()),
        num_embedding_parameters=sum(layer.weight.numel() for layer in embeddings),
        linears=linears,
        targets=retrievers.TARGETS_BY_FAMILY.get(config.model_type, ()),
    )
