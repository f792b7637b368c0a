"""Load a model into memory, ready to encode: without its head, in eval mode, adapters applied.

In: a model on this machine's disk. Out: the module that transformers' `AutoModel` makes of it, after
a check that no weight is missing or unexpected. Memory: the model in its type; an adapter needs one
weight in float32 more.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from readapt_ray.catalog.models import OpenModel
from readapt_ray.errors import ModelError, WeightMismatchError, first_line
from readapt_ray.hardware import num_cores
from readapt_ray.quick_imports import import_for_models
from readapt_ray.weights.adapter import Adapter, listed
from readapt_ray.weights.bundle import open_bundle
from readapt_ray.weights.merging import Readapter, Scales
from readapt_ray.weights.ordered_map import ordered_map
from readapt_ray.weights.weight_files import Checkpoint, is_buffer, is_head

logger = logging.getLogger("readapt_ray")

T = TypeVar("T")


def load_model(model: OpenModel, *, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Load a model without its head, ready to encode.

    Args:
        model: full weights; a LoRA or DoRA adapter, which is applied to its base; or a bundle, which is merged.
        dtype: type of the loaded weights. An adapter is applied in float32, then cast once. A bundle is merged with its
            own scales, and gives the same values as the model that such a merge writes.
        device: where to put it: cpu, cuda, cuda:1.

    Returns:
        The transformers module in eval mode, without gradients, with sdpa attention if its class supports that.

    Raises:
        ModelError: no safetensors, an architecture that transformers does not have, or an adapter of another kind.
        WeightMismatchError: the files have weights that the architecture lacks, or lack weights that it has.
    """
    checkpoint, change = open_weights(model)
    holder = model.base if change is not None else model
    module = load_headless(
        holder.folder, holder.name, checkpoint, dtype, config_folder=model.folder if model.is_factors else None
    )
    if isinstance(change, Adapter):
        _lay_on(module, checkpoint, change)
    elif change is not None:
        _write_merged(module, change, open_bundle(model).scales)
    return module.eval().requires_grad_(False).to(device)


def open_weights(model: OpenModel) -> tuple[Checkpoint, Adapter | Readapter | None]:
    """Open the weights of a model; only headers are read.

    Args:
        model: full weights, an adapter (its base is found, too), or a bundle.

    Returns:
        The full weights, and what is added to them: an adapter, the models of a bundle, or None. The full weights of an
        adapter or bundle are those of its base.

    Raises:
        ModelError, WeightMismatchError: as `load_model`.
    """
    holder = model.base if model.is_adapter or model.is_factors else model
    checkpoint = Checkpoint(holder.folder, name=holder.name)
    if model.is_factors:
        return checkpoint, open_bundle(model).readapter(checkpoint)
    return checkpoint, Adapter(model.folder, checkpoint, name=model.name) if model.is_adapter else None


def load_headless(
    folder: Path, name: str, checkpoint: Checkpoint, dtype: torch.dtype, *, config_folder: Path | None = None
) -> torch.nn.Module:
    """Load full weights into transformers' module without a head, on the CPU.

    A pooler that the files lack is left at random values, since no vector depends on it.

    Args:
        folder: folder with the weights.
        name: what the user calls the model; used in errors.
        checkpoint: the same weights, opened; says which stored tensors belong to heads, which are left out.
        dtype: type of the module's weights.
        config_folder: folder with the config.json; None takes `folder`.

    Raises:
        ModelError, WeightMismatchError: as `load_model`.
    """
    with _quiet():
        try:
            module, report = _from_pretrained(folder, dtype, config_folder or folder)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelError(
                f"transformers cannot load {name!r}: {first_line(error)}; check its config.json and weights"
            ) from error
    missing = sorted(each for each in report["missing_keys"] if not each.startswith("pooler.") and not is_buffer(each))
    aside = {*checkpoint.heads, *checkpoint.buffers}
    unexpected = sorted(
        each
        for each in report["unexpected_keys"]
        if each not in aside and not is_head(each) and "pooler." not in each  # a head may be renamed when it is loaded
    )
    problems = [
        *(f"{each}: not in the files" for each in missing),
        *(f"{each}: unknown to {type(module).__name__}" for each in unexpected),
        *(f"{each}: {list(has)} in the files, {list(due)} due" for each, has, due in report["mismatched_keys"]),
    ]
    if problems:
        raise WeightMismatchError(
            f"the weights of {name!r} do not fit {type(module).__name__}, which its config.json names: "
            f"{listed(problems)}; fetch the model again, or correct its config.json"
        )
    return module  # type: ignore[no-any-return]


def _from_pretrained(folder: Path, dtype: torch.dtype, config_folder: Path) -> Any:
    """Return the module, and the report on which tensors it found."""
    import_for_models()
    from transformers import AutoConfig, AutoModel

    load = functools.partial(
        AutoModel.from_pretrained,
        str(folder),
        config=AutoConfig.from_pretrained(str(config_folder), local_files_only=True, trust_remote_code=False),
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    return with_best_attention(load)


def with_best_attention(load: Callable[..., T]) -> T:
    """Load a model with torch's sdpa attention, or eager attention if its class lacks it (MPNet, Gemma 2, DeBERTa).

    Args:
        load: a loading function of transformers, which is called with `attn_implementation`, a second time if the class
            lacks sdpa. Its other errors are passed on.

    Returns:
        What `load` returned.
    """
    try:
        return load(attn_implementation="sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return load(attn_implementation="eager")


@contextlib.contextmanager
def in_float32(module: torch.nn.Module) -> Iterator[bool]:
    """Widen a module's parameters to float32 during a `with` block; each then gets its own type back.

    Values that the block does not change come back without loss. It takes twice the memory of a model in bfloat16.
    Buffers are not widened. A weight that overflowed in float16 stays infinite.

    Yields:
        Whether all parameters were widened. If memory ran out, a warning is logged and it is False; then some are
        widened and some not, so the module cannot compute.
    """
    narrow = [(each, each.dtype) for each in module.parameters() if each.dtype != torch.float32]
    try:
        try:
            for parameter, _ in narrow:
                parameter.data = parameter.data.float()
            is_possible = True
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("no memory to compute in float32: what overflows is not encoded again")
            is_possible = False
        yield is_possible
    finally:
        for parameter, dtype in narrow:
            parameter.data = parameter.data.to(dtype)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether torch raised an error because an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@torch.no_grad()
def _lay_on(module: torch.nn.Module, checkpoint: Checkpoint, adapter: Adapter) -> None:
    parameters = dict(module.named_parameters())
    for name in adapter.names():
        weight_OI = checkpoint.read(name).float()
        parameters[name].copy_(weight_OI + adapter.factors(name).update(weight_OI))


def _write_merged(module: torch.nn.Module, readapter: Readapter, scales: Scales) -> None:
    """Write the weights that a merge would write, with the same rounding."""
    parameters = dict(module.named_parameters())

    @torch.no_grad()  # torch keeps this setting per thread
    def write(name: str) -> None:
        parameters[name].copy_(readapter.weight(name, scales).to(readapter.dtype(name)))

    names = [name for name in readapter.names() if name in parameters]
    for _ in ordered_map(write, names, num_threads=num_cores(), num_waiting=num_cores()):
        pass


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report and progress bar during a load; `load_headless` raises errors for what matters."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
