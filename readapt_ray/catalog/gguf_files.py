"""Convert a GGUF file, the format of llama.cpp, to a model folder that transformers opens.

In: a GGUF file whose architecture and quantised types transformers can decode. Out: config.json, tokenizer and
safetensors. Weights are float16, but bfloat16 or float32 if all matrices in the file have that type. Memory is twice
the weights in the new type.
"""

import importlib
import logging
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from readapt_ray.errors import InputError, ModelError, first_line
from readapt_ray.model_file_names import CHAT_TEMPLATE_NAME, CONFIG_NAME, SINGLE_NAME, TOKENIZER_FILES

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("readapt_ray")

SUFFIX = ".gguf"
WRITTEN = (SINGLE_NAME, CONFIG_NAME, "generation_config.json", CHAT_TEMPLATE_NAME, *TOKENIZER_FILES)
"""Files that a conversion may write."""

_PART = re.compile(r".+-\d{5}-of-\d{5}\.gguf")
_MB = 1_000_000
_UNREADABLE = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    RuntimeError,
    OSError,
)
"""Errors that transformers and gguf raise for a file they cannot decode."""


def in_folder(folder: Path, name: str) -> list[str]:
    """Return the name of the GGUF file of a folder in a list; an empty list if it has none.

    Of a model in parts, the name of the first part, which `convert` refuses with advice.

    Args:
        folder: a folder without other weights.
        name: name that the user gave; used in errors.

    Raises:
        ModelError: the folder has several GGUF files that are not parts of one model.
    """
    found = sorted(path.name for path in folder.glob(f"*{SUFFIX}"))
    if len(found) > 1 and not all(map(_PART.fullmatch, found)):
        raise ModelError(f"{name!r} has {len(found)} GGUF files: {', '.join(found)}; give the path of one of them")
    return found[:1]


def convert(file: Path, target: Path, name: str) -> None:
    """Convert the model in a GGUF file to a folder for transformers.

    Args:
        file: the GGUF file.
        target: the folder to write.
        name: name that the user gave; used in errors.

    Raises:
        InputError: gguf or accelerate, which transformers needs for the file, is not installed.
        ModelError: the file is cut short, is one part of a model, cannot be decoded, or holds NaN.
    """
    if _PART.fullmatch(file.name):
        raise ModelError(
            f"{file} is one part of a model; join the parts first: llama-gguf-split --merge {file.name} OUT.gguf"
        )
    logger.warning(
        "%s: %s (%s MB) is converted once to safetensors in %s", name, file.name, _in_mb(file.stat().st_size), target
    )
    started = time.monotonic()
    try:
        importlib.import_module("accelerate")  # transformers reads GGUF with it
        dtype = _dtype(importlib.import_module("gguf").GGUFReader(file))
        model, tokenizer, missing = _load(file, dtype)
    except ImportError as error:
        raise InputError(
            f"{name!r} is a GGUF file, and what reads it is not installed ({first_line(error)}); pip install "
            f"'readapt-ray[gguf]'"
        ) from error
    except _UNREADABLE as error:
        raise ModelError(
            f"{file.name} of {name!r} cannot be read ({first_line(error)}): it is cut short, or transformers does not know its "
            f"architecture or its kind of quantisation; fetch it again, or give the model as safetensors"
        ) from error
    if missing:
        raise ModelError(
            f"{file.name} of {name!r} lacks {len(missing)} tensors of a {type(model).__name__}, first {missing[0]!r}; fetch it "
            f"again, or give the model as safetensors"
        )
    for tensor_name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ModelError(
                f"{tensor_name} in {file.name} of {name!r} holds NaN or values beyond {dtype}; give the model as safetensors"
            )
    model.save_pretrained(target, max_shard_size="1000GB")
    tokenizer.save_pretrained(target)
    logger.info(
        "%s: converted in %.0f s: %s MB in %s",
        *(name, time.monotonic() - started, _in_mb((target / SINGLE_NAME).stat().st_size), dtype),
    )


def _in_mb(num_bytes: int) -> str:
    return f"{max(1, round(num_bytes / _MB)):,}"


def _dtype(reader: Any) -> "torch.dtype":
    """Choose the dtype of the written weights from the types of the matrices in the file."""
    import torch

    types = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return {frozenset({"F32"}): torch.float32, frozenset({"BF16"}): torch.bfloat16}.get(frozenset(types), torch.float16)


def _load(file: Path, dtype: "torch.dtype") -> tuple[Any, Any, list[str]]:
    """Load model and tokenizer from a GGUF file; also return the names of weights that the file lacks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model, report = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    return model, tokenizer, sorted(report["missing_keys"])
