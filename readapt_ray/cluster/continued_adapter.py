"""Continue the training of an adapter: check that it fits the model and the options, and load it on a worker.

In: an adapter that `readapt train` or PEFT saved. Out: the options with the adapter's shape, and a model that starts
with its weights. The optimizer and the learning-rate schedule start from the beginning.
"""

from collections.abc import Collection
from typing import Any, TypeVar

from readapt_ray import artifacts
from readapt_ray.catalog import models
from readapt_ray.catalog.models import OpenModel
from readapt_ray.cluster import on_worker
from readapt_ray.cluster.optimization import OptimizationConfig
from readapt_ray.config import flag
from readapt_ray.errors import InputError, ModelError
from readapt_ray.model_file_names import ADAPTER_WEIGHTS_NAME

Config = TypeVar("Config", bound=OptimizationConfig)

_REFUSED = ("rank_pattern", "alpha_pattern", "use_rslora", "layers_to_transform", "exclude_modules")
"""Options of PEFT that training does not support."""


def with_shape_of(config: Config, adapter: OpenModel) -> Config:
    """Return a copy of the options with the method, rank, alpha and target modules of an adapter.

    The adapter's dropout is not taken over.

    Args:
        config: options of training; values that the user set must equal the adapter's.
        adapter: the model that `continue_from` names.

    Raises:
        InputError: the user gave another value for one of these options.
        ModelError: the model is not an adapter, or has PEFT options that training does not support.
    """
    if not adapter.is_adapter:
        raise ModelError(
            f"continue_from = {adapter.name!r} is not an adapter; give the output folder of `readapt train`"
        )
    there = adapter.adapter_config
    targets = there.get("target_modules")
    if not isinstance(targets, list) or (odd := [name for name in _REFUSED if there.get(name)]):
        what = f"target_modules = {targets!r}" if not isinstance(targets, list) else f"{odd[0]} = {there[odd[0]]!r}"
        raise ModelError(
            f"continue_from = {adapter.name!r} has {what}, which cannot be trained on; train a new adapter"
        )
    shape: dict[str, Any] = {
        "method": "dora" if there.get("use_dora") else "lora",
        "lora_rank": int(there["r"]),
        "lora_alpha": float(there["lora_alpha"]),
        "target_modules": tuple(sorted(targets)),
    }
    for name, expected in shape.items():
        given = getattr(config, name)
        same = tuple(sorted(given)) == expected if name == "target_modules" else given == expected
        if name in config.model_fields_set and given and not same:
            raise InputError(
                f"{name} = {given!r}, and continue_from = {adapter.name!r} has {name} = {expected!r}; leave {flag(name)} out, or "
                f"leave {flag('continue_from')} out to train a new adapter"
            )
    return config.model_copy(update=shape)


def check_base(adapter: OpenModel, model: OpenModel) -> None:
    """Check that an adapter was trained on this model: its layers fit, and the model's fingerprint is the recorded one.

    Args:
        adapter: the adapter.
        model: the pretrained model that training will start from.

    Raises:
        ModelError: it was trained on another model or by another stage, or does not say on which model.
        WeightMismatchError: it changes layers that the model does not have, or has in another size.
    """
    from readapt_ray.weights.adapter import Adapter
    from readapt_ray.weights.weight_files import Checkpoint

    Adapter(adapter.folder, Checkpoint(model.folder, name=model.name), name=adapter.name)
    manifest = artifacts.read_manifest(str(adapter.folder))
    if manifest is not None and manifest.stage != "train":
        raise ModelError(
            f"continue_from = {adapter.name!r} is the output of {manifest.stage!r}; give the output folder of `readapt train`"
        )
    trained_on = manifest.inputs["pretrained"] if manifest else adapter.base.fingerprint
    if trained_on != model.fingerprint:
        raise ModelError(
            f"continue_from = {adapter.name!r} was trained on {adapter.adapter_config.get('base_model_name_or_path')!r}, whose "
            f"weights are not the weights of {model.name!r}; give that model, or train a new adapter"
        )


def load(model: Any, name: str, *, expected: Collection[str], driver_node: str) -> None:
    """Load the weights of an earlier adapter into the adapters of a model, in place, on a worker.

    With ZeRO-3, all workers must call it.

    Args:
        model: network with new adapters of the same shape.
        name: the earlier adapter: a folder, URI or hub id that this node can open.
        expected: fingerprints, one of which the adapter must have; checked on other nodes than the driver's.
        driver_node: `on_worker.this_node` of the driver.

    Raises:
        FingerprintMismatchError: this node has another adapter of this name.
        ModelError: the adapter has other layers.
    """
    from safetensors.torch import load_file

    from readapt_ray.training import dora

    adapter = models.open_model(name)
    on_worker.check_same_model(name, lambda: adapter.fingerprint, expected, driver_node=driver_node)
    dora.load_adapter_state(model, load_file(adapter.folder / ADAPTER_WEIGHTS_NAME), name=name)
