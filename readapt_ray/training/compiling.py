"""Compile a model's layers with torch.compile, and use them only if they give the same results as uncompiled layers.

Before the first forward pass of a training, output and gradients of one layer are compared with and without
compilation, on its real input. If they differ, or the compiler fails, all workers train without it and a warning is
logged.
"""

import contextlib
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from readapt_ray.nn.quantized import weight_of
from readapt_ray.training import dora

logger = logging.getLogger("readapt_ray")

_MEMORY_BUDGET = 0.9
"""Below 1 the compiler recomputes inputs after dropout, and keeps a quarter less for the backward pass
(compiled_traffic.py)."""
_MAX_ERROR = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 1e-3}
"""Largest accepted difference by type: norm of the difference / norm of the uncompiled result."""
_NUM_DRAWS = 4
"""Number of uncompiled passes. Dropout makes them differ, and this noise raises the accepted difference."""


class _CapturedError(Exception):
    """Raised to end a forward pass when its first layer is reached."""


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return the transformer layers of a model: its longest ModuleList. Raises ValueError if it has none."""
    return max((each for each in model.modules() if isinstance(each, nn.ModuleList)), key=len)


def compile_layers(model: nn.Module) -> None:
    """Make torch compile each layer of a model at its first call, with one graph for all lengths.

    It also makes adapters keep casts of their factors, and sets torch's memory budget for the whole process. It does
    not test the results; see `compile_if_right`.
    """
    torch._functorch.config.activation_memory_budget = _MEMORY_BUDGET
    for _, adapted in dora.adapted_layers(model):
        adapted.keep_casts()
    for layer in layers_of(model):
        layer.compile(dynamic=True)


def compile_if_right(model: nn.Module) -> None:
    """Compile all transformer layers of a model at its first forward pass with gradients.

    One layer, compared with itself uncompiled (output and gradients), decides for all of them: if any worker sees a
    difference or an error, no layer stays compiled, and a warning is logged. If the test passes, compiler errors later
    on are suppressed in the whole process. The first forward pass is collective: all workers must make it.
    """

    def before_first(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        handle.remove()
        try:
            with torch.random.fork_rng(_devices(model)):
                reason = _difference(model, *_input_of_first_layer(module, args, kwargs))
        except Exception as error:  # the compiler may raise anything; so may a model that calls its layers differently
            reason = f"{type(error).__name__}: {' '.join(str(error).splitlines()[:2])}"
        if _any_worker(bool(reason), model):
            _uncompile(model)
            if reason:
                logger.warning("layers are not compiled: %s", reason)
            return
        # If the compiler fails later on another shape, that pass is computed uncompiled.
        torch._dynamo.config.suppress_errors = True

    handle = model.register_forward_pre_hook(before_first, with_kwargs=True)


def _input_of_first_layer(model: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that a forward pass gives to the first layer, without computing the layer."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def capture(_: nn.Module, taken: Any, given: Any) -> None:
        found.append((taken, given))
        raise _CapturedError

    handle = layers_of(model)[0].register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with torch.no_grad(), contextlib.suppress(_CapturedError):
            model.forward(*args, **kwargs)
    finally:
        handle.remove()
    return found[0]


def _difference(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Compile the layers, and compare one with itself uncompiled; return the difference as text, empty if none."""
    layer = layers_of(model)[0]
    with _with_visible_factors(layer):
        expected = [_passes(layer, args, kwargs) for _ in range(_NUM_DRAWS)]
        compile_layers(model)
        found = _passes(layer, args, kwargs)
    for name in expected[0]:
        draws = [each[name] for each in expected]
        noise = max(_relative_error(one, other) for one, other in itertools.combinations(draws, 2))
        bound = _MAX_ERROR[found["output"].dtype] + 3 * noise
        off = min(_relative_error(found[name], each) for each in draws)
        if not off <= bound:  # true for NaN, too
            return f"torch.compile gives a layer's {name} off by {off:.2g} of its norm; up to {bound:.2g} is right"
    return ""


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.float()
    return float((found.float() - wanted).norm() / wanted.norm().clamp_min(1e-12))


def _passes(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Run a layer forward and backward; return its output and gradients by name."""
    hidden = args[0].detach().clone().requires_grad_()
    trained = {name: each for name, each in layer.named_parameters() if each.requires_grad}
    output = layer(hidden, *args[1:], **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    weights = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=torch.float32).view(output.shape)
    wanted = [hidden, *trained.values()]
    gradients = torch.autograd.grad((output.float() * weights).sum(), wanted, allow_unused=True)
    named = zip(["gradient of the input", *(f"gradient of {name}" for name in trained)], gradients, strict=True)
    return {"output": output.detach()} | {name: each for name, each in named if each is not None}


@contextlib.contextmanager
def _with_visible_factors(layer: nn.Module) -> Iterator[None]:
    """Give adapters random updates of a tenth of their weight's norm during a `with` block, since B may be 0."""
    before = [(each.lora_B, each.lora_B.detach().clone()) for _, each in dora.adapted_layers(layer)]
    try:
        with torch.no_grad():
            for _, each in dora.adapted_layers(layer):
                each.lora_B.normal_()
                update_norm = each.scaling * (each.lora_B @ each.lora_A).norm()
                each.lora_B.mul_(0.1 * weight_of(each.base).norm() / update_norm)
        dora.refresh(layer)
        yield
    finally:
        with torch.no_grad():
            for factor, value in before:
                factor.copy_(value)
        dora.refresh(layer)


def _uncompile(model: nn.Module) -> None:
    for layer in layers_of(model):
        layer._compiled_call_impl = None
    for _, adapted in dora.adapted_layers(model):
        adapted.drop_casts()


def _any_worker(answer: bool, model: nn.Module) -> bool:
    """Return whether any worker's answer is True. Collective."""
    if not torch.distributed.is_initialized():
        return answer
    told = torch.tensor(int(answer), device=next(model.parameters()).device)
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
    return bool(told)


def _devices(model: nn.Module) -> list[torch.device]:
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []
