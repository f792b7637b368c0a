"""From the name of a model to a folder on this machine's disk.

A `MODEL` is a catalog name, a local folder, a URI, or a hub id, in this order. Only safetensors,
configuration and tokenizer files are fetched, and pickled weights where there are no others, which
are converted (`pickled.py`); nothing in a model folder is ever executed.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from readapt_ray.artifacts import MANIFEST_NAME, fingerprint, read_manifest
from readapt_ray.catalog import model_cache, pickled, retrievers
from readapt_ray.catalog.retrievers import Encoding
from readapt_ray.errors import ModelError
from readapt_ray.storage import Location

CONTRACT_NAME = "readapt.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
_BUILTIN = "builtin:"
_BUILTIN_FOLDER = Path(__file__).parent.parent / "data"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_MODEL_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")


@dataclass(frozen=True)
class Model:
    """A model on this machine's disk. `name` is what the user called it."""

    name: str
    folder: Path

    @property
    def is_adapter(self) -> bool:
        """Whether it is a PEFT adapter, to be laid on the model that it was trained on."""
        return (self.folder / ADAPTER_CONFIG_NAME).is_file()

    def read_json(self, file_name: str) -> dict[str, Any]:
        """A JSON file of the folder; empty where there is none.

        Raises:
            ModelError: it is not JSON.
        """
        path = self.folder / file_name
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ModelError(f"{path} is not JSON: {error}") from error

    @property
    def adapter_config(self) -> dict[str, Any]:
        """PEFT's config of an adapter."""
        return self.read_json(ADAPTER_CONFIG_NAME)

    def base(self) -> "Model":
        """The model that this adapter was trained on.

        Raises:
            ModelError: the adapter does not say, or it cannot be found.
        """
        name = self.adapter_config.get("base_model_name_or_path")
        if not name:
            raise ModelError(f"{self.name!r} is an adapter that does not name its base model in {ADAPTER_CONFIG_NAME}")
        return find_model(str(name))

    def fingerprint(self) -> str:
        """Stands for every byte of weights, configuration and tokenizer."""
        if (self.folder / MANIFEST_NAME).is_file():
            manifest = read_manifest(str(self.folder))
            if manifest is not None:
                return manifest.fingerprint
        return fingerprint(Location(str(self.folder)).content_fingerprint(_MODEL_SUFFIXES))


def find_model(name: str) -> Model:
    """Bring a model onto this machine's disk, unless it is there.

    Args:
        name: a catalog name, a local folder, a URI, or a hub id.

    Raises:
        ModelError: nothing of that name, or what is there is not a model.
    """
    target = retrievers.hub_id(name)
    if target.startswith(_BUILTIN):
        folder = _BUILTIN_FOLDER / target.removeprefix(_BUILTIN)
    elif "://" in target:
        folder = _fetch_uri(target)
    elif Path(target).expanduser().is_dir():
        folder = Path(target).expanduser().resolve()
    elif _HUB_ID.fullmatch(target) and not Path(target).exists():
        folder = _fetch_hub(name, target)
    else:
        known = ", ".join([*retrievers.PRETRAINED, *(row.name for row in retrievers.RETRIEVERS)])
        raise ModelError(f"no model {name!r}: not a folder, not a URI, not a hub id, and not in the catalog ({known})")
    model = Model(name=name, folder=pickled.safe_folder(folder, name))
    if not model.is_adapter and not (folder / "config.json").is_file():
        raise ModelError(f"{name!r} is not a model: {folder} has neither config.json nor {ADAPTER_CONFIG_NAME}")
    return model


def _fetch_hub(name: str, hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(_FETCHED)))
        if not pickled.has_safetensors(folder):
            folder = Path(snapshot_download(hub_id, allow_patterns=[*_FETCHED, *pickled.PICKLED]))
        model_cache.checked_snapshot(folder, lambda file: snapshot_download(hub_id, allow_patterns=[file]))
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"cannot fetch {name!r} ({hub_id} on the hub): {_first_line(error)}; "
            f"check the name and the network, set HF_TOKEN for a gated model, or give a local folder"
        ) from error


def _fetch_uri(uri: str) -> Path:
    source = Location(uri)
    listing = source.listing(recursive=True)
    if not listing:
        raise ModelError(f"no model at {uri!r}: the folder is empty or does not exist")
    has_safetensors = any(relative.endswith(".safetensors") for relative, _ in listing)
    sizes_bytes = {
        relative: int(info.size)
        for relative, info in listing
        if relative.endswith(_MODEL_SUFFIXES)
        or (not has_safetensors and any(Path(relative).match(pattern) for pattern in pickled.PICKLED))
    }
    key = fingerprint([uri, [(relative, info.size, info.mtime_ns) for relative, info in listing]])
    return model_cache.fetched(source, sizes_bytes, key)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def encoding_of(model: Model) -> Encoding:
    """How a retriever wants its text: from its folder, from the catalog, or from sentence-transformers' files.

    Raises:
        ModelError: nothing says; the message lists what would.
    """
    contract = model.read_json(CONTRACT_NAME)
    if contract:
        return Encoding.parse(contract["encoding"], where=str(model.folder / CONTRACT_NAME))
    row = retrievers.find_retriever(model.name)
    if row is not None:
        return row.encoding
    if (model.folder / "modules.json").is_file():
        return _sentence_transformers_encoding(model)
    raise ModelError(
        f"nothing says how {model.name!r} wants its text: its folder has neither {CONTRACT_NAME} nor modules.json, and it "
        f"is not in the catalog; pass --encoding FILE.json with pooling, templates and specials, or a catalog name"
    )


def _sentence_transformers_encoding(model: Model) -> Encoding:
    modules = json.loads((model.folder / "modules.json").read_text(encoding="utf-8"))
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise ModelError(
            f"{model.name!r} has the modules {kinds}; understood are Transformer, Pooling and Normalize, in this order"
        )
    pooling = model.read_json(f"{modules[1]['path']}/config.json")
    chosen = _pooling_modes(pooling)
    names = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
    if len(chosen) != 1 or chosen[0] not in names:
        raise ModelError(f"{model.name!r} pools by {chosen}; understood is one of {sorted(names)}")
    settings = model.read_json("sentence_bert_config.json")
    encoder = model.read_json("config_sentence_transformers.json")
    _refuse_what_is_not_done(model, encoder, pooling)
    limit = int(settings.get("max_seq_length") or _longest_text(model))
    return Encoding.parse(
        {
            "query_template": _prompt(encoder, ("query",)) + "{text}",
            "passage_template": _prompt(encoder, ("document", "passage", "corpus")) + "{title} {text}",
            "pooling": names[chosen[0]],
            "normalize": "Normalize" in kinds,
            "add_bos": _adds(model, "bos"),
            "add_eos": _adds(model, "eos"),
            "max_query_tokens": limit,
            "max_passage_tokens": limit,
            "lower_case": bool(settings.get("do_lower_case")),
        },
        where=str(model.folder),
    )


def _prompt(encoder: dict[str, Any], names: tuple[str, ...]) -> str:
    """What sentence-transformers puts before a text: the first of these prompts that there is, else the default one."""
    prompts = encoder.get("prompts") or {}
    name = next((each for each in names if each in prompts), encoder.get("default_prompt_name"))
    return str(prompts.get(name) or "").replace("{", "{{").replace("}", "}}")


def _refuse_what_is_not_done(model: Model, encoder: dict[str, Any], pooling: dict[str, Any]) -> None:
    prompts = encoder.get("prompts") or {}
    if pooling.get("include_prompt") is False and any(prompts.values()):
        raise ModelError(
            f"{model.name!r} pools without the tokens of its prompt (include_prompt); that is not understood"
        )
    similarity = encoder.get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        raise ModelError(f"{model.name!r} compares vectors by {similarity!r}; understood are cosine and dot")


def _longest_text(model: Model) -> int:
    """Tokens, as sentence-transformers finds them: the tokenizer's limit, and the model's."""
    positions = model.read_json("config.json").get("max_position_embeddings") or 512
    return min(int(load_tokenizer(model).model_max_length), int(positions))


def _pooling_modes(config: dict[str, Any]) -> list[str]:
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        return [mode] if isinstance(mode, str) else list(mode)
    prefix = "pooling_mode_"
    return [
        name.removeprefix(prefix).removesuffix("_tokens").removesuffix("_token")
        for name, on in config.items()
        if name.startswith(prefix) and on
    ]


def _adds(model: Model, which: str) -> bool:
    """Whether the tokenizer of a folder puts its BOS (CLS) or EOS (SEP) around a text: asked, not assumed."""
    tokenizer = load_tokenizer(model)
    ids = tokenizer("a")["input_ids"]
    first = (tokenizer.bos_token_id, tokenizer.cls_token_id)
    last = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    edge, specials = (ids[0], first) if which == "bos" else (ids[-1], last)
    return edge is not None and edge in specials


def tokenizer_fingerprint(model: Model) -> str:
    """Stands for every byte of the tokenizer."""
    folder = Location(str(model.folder))
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model", "special_tokens_map.json")
    return fingerprint({name: (folder / name).sha256() for name in names if (folder / name).is_file()})


def load_tokenizer(model: Model) -> Any:
    """The tokenizer of a model, or of the model that an adapter was trained on.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    folder = model.folder
    if model.is_adapter and not (folder / "tokenizer_config.json").is_file():
        folder = model.base().folder
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{model.name!r} has no tokenizer that can be read: {_first_line(error)}") from error
