"""Load models for training, whole or partitioned over ZeRO-3 workers, and save them.

Under ZeRO-3, worker 0 reads one tensor at a time from disk and distributes it. So a worker holds only its part of the
model and one tensor, and needs no memory for the whole model.
"""

import functools
import json
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from readapt_ray.catalog.models import OpenModel
from readapt_ray.catalog.retrievers import Objective
from readapt_ray.catalog.shapes import BaseDtype, auto_class
from readapt_ray.errors import InputError, ModelError
from readapt_ray.model_file_names import CHAT_TEMPLATE_NAME, CONFIG_NAME, INDEX_NAME, SINGLE_NAME, TOKENIZER_FILES
from readapt_ray.nn.quantized import quantize
from readapt_ray.storage import Location
from readapt_ray.training import dora, objectives
from readapt_ray.training.compiling import compile_if_right
from readapt_ray.training.engine import deepspeed_config, prepare_deepspeed
from readapt_ray.training.partitioned import gathered
from readapt_ray.weights.loading import load_model, with_best_attention
from readapt_ray.weights.stored_names import table_in, table_of
from readapt_ray.weights.weight_files import StoredTensor, by_weight, modern_name, stored_tensors

_SHARD_BYTES = 2 << 30


def load_for_training(
    source: OpenModel,
    *,
    objective: Objective | None,
    dtype: torch.dtype,
    device: torch.device,
    zero_stage: int,
    base_dtype: BaseDtype = "auto",
) -> Any:
    """Load a model for training, in train mode on a device; `objectives.prepare` is applied if it has a head.

    Which weights are trained is decided afterwards, by `make_trainable`.

    Args:
        source: a model with full weights.
        objective: the model is loaded with the head for this objective; None loads it without a head.
        dtype: type of the weights.
        device: where to put them.
        zero_stage: at 3 each worker holds a part of every weight, and all workers must call this together.
        base_dtype: type to quantize the linear layers to, which freezes them; auto keeps `dtype`. Not with ZeRO-3.

    Raises:
        InputError: the package that decodes `base_dtype` is not installed.
        ModelError: the folder holds no such model, or weights that the architecture has are missing.
    """
    if zero_stage == 3:
        model = _load_partitioned(source, objective, dtype=dtype, device=device)
    else:
        if objective is None:
            # If weights will be quantized, load them on the CPU; `quantize` moves them to the device one by one.
            model = load_model(source, dtype=dtype, device=str(device) if base_dtype == "auto" else "cpu")
        else:
            model = _load_with_head(source, objective, dtype=dtype)
        quantize(model, base_dtype, device)
        model = model.to(device)
    if objective is not None:
        objectives.prepare(model, source.name)
    return model.train()


def _load_with_head(source: OpenModel, objective: Objective, *, dtype: torch.dtype) -> Any:
    try:
        model, loading = with_best_attention(
            functools.partial(
                auto_class(objective).from_pretrained,
                str(source.folder),
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                use_safetensors=True,
            )
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source.name!r} is not a model for the objective {objective}: {error}") from error
    _refuse_missing(source, objective, loading["missing_keys"])
    return model


def _refuse_missing(source: OpenModel, objective: Objective | None, missing: Any) -> None:
    if missing:
        need = "its files are incomplete" if objective is None else "give the pretrained model, with its head"
        raise ModelError(f"{source.name!r} lacks the weights {sorted(missing)[:5]}; {need}")


def _load_partitioned(
    source: OpenModel, objective: Objective | None, *, dtype: torch.dtype, device: torch.device
) -> Any:
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    prepare_deepspeed()
    try:
        config = AutoConfig.from_pretrained(str(source.folder), trust_remote_code=False)
        # Init's option dtype becomes bfloat16 on devices without float16 (DeepSpeed 0.19.8), and also rounds buffers.
        settings = deepspeed_config(zero_stage=3, max_gradient_norm=0.0)
        settings |= {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
        with (
            deepspeed.zero.Init(
                config_dict_or_path=settings,
                remote_device=str(device),
                tensor_overrides=[DeepSpeedTensorOverride.device],
            ),
            no_init_weights(),
        ):
            model: Any = with_best_attention(functools.partial(auto_class(objective).from_config, config, dtype=dtype))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source.name!r} is not a model for the objective {objective}: {error}") from error
    model.tie_weights()
    table = table_in(source.folder)
    stored: dict[str, StoredTensor] = {}
    for each, tensor in stored_tensors(source.folder, source.name).items():
        stored |= by_weight(modern_name(each), tensor, table)
    found = {name: _find(name, stored, model.base_model_prefix) for name, _ in model.named_parameters()}
    _refuse_missing(source, objective, [name for name, tensor in found.items() if tensor is None])
    for name, parameter in model.named_parameters():
        with gathered([parameter], changed_by_rank=0), torch.no_grad():
            if torch.distributed.get_rank() == 0:
                parameter.copy_(found[name].read())  # type: ignore[union-attr]
    return model


def _find(name: str, stored: dict[str, StoredTensor], prefix: str) -> StoredTensor | None:
    """Find a parameter among the stored tensors, whose names may have the model's prefix or lack it."""
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((stored[each] for each in candidates if each in stored), None)


def make_trainable(model: nn.Module, shape: dora.AdapterShape | None) -> None:
    """Add adapters to a model and freeze its other weights, in place; with `shape` None, train all weights instead.

    Raises:
        ModelError: a target of the adapter matches no linear layer.
    """
    if shape is None:
        model.requires_grad_(True)
    else:
        dora.add_adapters(model, shape)


def reduce_memory(model: Any, *, gradient_checkpointing: bool, compile_layers: bool, zero_stage: int) -> None:
    """Enable gradient checkpointing (less memory) and torch.compile (faster steps, slower start) on a model.

    Args:
        model: a transformers model; changed in place.
        gradient_checkpointing: recompute a layer's activations in the backward pass. DoRA's norms are not recomputed,
            since they change only with an optimizer step.
        compile_layers: torch.compile each layer; see `compile_if_right`.
        zero_stage: ZeRO stage of the training.

    Raises:
        InputError: `compile_layers` with ZeRO-3, whose hooks torch.compile cannot trace.
    """
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not compile_layers:
        return
    if zero_stage == 3:
        raise InputError("torch_compile does not go with zero_stage = 3; choose a lower stage, or leave it off")
    compile_if_right(model)


def save_model(model: Any, source: Location, output: Location) -> None:
    """Write all weights as a Hugging Face folder, with the tokenizer files of `source`, the folder of the original.

    All workers may call it, and under ZeRO-3 all must; worker 0 writes. Files of the same name are replaced. Memory:
    two times a shard of 2 GB.
    """
    file_of, num_bytes = _write_weights(model, output)
    if torch.distributed.get_rank() != 0:
        return
    for file in (*TOKENIZER_FILES, CHAT_TEMPLATE_NAME):
        if (source / file).is_file():
            (source / file).copy_to(output / file)
    config = {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}
    (output / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    files = sorted(set(file_of.values()))
    if len(files) == 1:
        (output / files[0]).filesystem.move((output / files[0]).path, (output / SINGLE_NAME).path)
        return
    index = {"metadata": {"total_size": num_bytes}, "weight_map": file_of}
    (output / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _write_weights(model: Any, output: Location) -> tuple[dict[str, str], int]:
    """Write the weights in numbered files, under the names that the model's family uses in files.

    Returns:
        The file of each tensor, and the bytes of all tensors; valid only on worker 0.
    """
    is_writer = torch.distributed.get_rank() == 0
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    file_of: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    num_bytes = held_bytes = 0

    def flush() -> None:
        file = f"model-{len(set(file_of.values())) + 1:05d}.safetensors"
        (output / file).write_bytes(to_safetensors(shard, metadata={"format": "pt"}))
        file_of.update(dict.fromkeys(shard, file))
        shard.clear()

    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied}
    for name, weights in table_of(model.config.model_type).stored(state):
        parts = [state[each] for each in weights]
        with gathered(parts):
            if not is_writer:
                continue
            shard[name] = torch.cat(parts).detach().cpu() if len(parts) > 1 else _copied(parts[0])
        num_bytes += shard[name].nbytes
        held_bytes += shard[name].nbytes
        if held_bytes >= _SHARD_BYTES:
            flush()
            held_bytes = 0
    if shard:
        flush()
    return file_of, num_bytes


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone().contiguous()
