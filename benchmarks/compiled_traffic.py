"""Estimate what a compiled training step asks of a GPU, without one: kernels and bytes per layer after fusion.

    python benchmarks/compiled_traffic.py                      # a table of all shapes
    python benchmarks/compiled_traffic.py --shapes mistral-7b

`step_traffic.py` counts the kernels of eager mode. Here torch.compile traces the same layer, and its compiler decides what to
fuse, on tensors without data. Counted are the kernels that it would generate, with the bytes that they read and write, and
what the forward pass keeps for the backward pass. These are estimates until a GPU confirms them: the compiler decides as for
a CPU, except that it fuses concatenations as it does for a GPU.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._inductor import compile_fx, config
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import step_traffic
from readapt_ray.nn import attention
from readapt_ray.training.compiling import compile_layers

_NO_KERNEL = ("MultiOutput", "NopKernel")
_OF_MATRICES = ("mm", "addmm", "bmm", "_varlen_attn")


@dataclass
class Fused:
    """Counts of one layer's forward or backward pass after fusion."""

    num_kernels: int = 0
    elementwise_bytes: int = 0
    """Bytes that all kernels except matrix products and attention read and write."""
    outputs: list[Any] = field(default_factory=list)
    """Tensors that the pass returns: those of the forward pass are its output and what is kept for the backward pass."""
    made_bytes: int = 0
    """Bytes of the outputs that are not views of inputs."""


def estimate(shape: str, num_tokens: int) -> dict[str, float]:
    """Return the figures of a layer of one shape, both passes together.

    Args:
        shape: a key of `step_traffic.SHAPES`.
        num_tokens: in one row, as passages of 80 tokens.
    """
    passes: list[Fused] = []
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(attention, "_KERNEL_DEVICE", "cpu"),
        mock.patch.object(attention, "_is_able", lambda _: True),
        config.patch(force_pointwise_cat=True),
        torch._functorch.config.patch(activation_memory_budget=1.0),  # as it was, afterwards
    ):
        model = step_traffic.make_model(shape, 1, device="cpu")
        with mock.patch.object(torch.nn.Module, "compile", _compile_by(_counting(passes))):
            compile_layers(model)
        batch = step_traffic.make_batch(num_tokens, is_masked=shape == "modernbert-base", device="cpu")
        step_traffic.loss_of(model, batch).backward()
    torch._dynamo.reset()
    kept = passes[0].made_bytes - passes[0].outputs[0].nbytes
    return {
        "kernels_per_layer": sum(each.num_kernels for each in passes),
        "elementwise_gb_per_layer": round(sum(each.elementwise_bytes for each in passes) / 1e9, 3),
        "saved_kb_per_token_and_layer": round(kept / num_tokens / 1e3, 1),
    }


def _counting(passes: list[Fused]) -> Callable[..., Any]:
    """Return a backend of torch.compile that compiles nothing: it counts what would be, and returns empty tensors."""

    def count(graph: fx.GraphModule, inputs: Any, **_: Any) -> Callable[..., list[Any]]:
        found = _fused(graph, inputs)
        passes.append(found)
        return lambda *_: [
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=each.device)
            if isinstance(each, torch.Tensor)
            else each
            for each in found.outputs
        ]

    return lambda graph, inputs: compile_fx.compile_fx(graph, inputs, inner_compile=count)


def _compile_by(backend: Callable[..., Any]) -> Callable[..., None]:
    """Return `Module.compile` with another backend, for one length."""

    def compile_module(module: torch.nn.Module, **_: Any) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend=backend, fullgraph=True, dynamic=False)

    return compile_module


def _fused(graph: fx.GraphModule, inputs: Any) -> Fused:
    """Lower a graph as torch.compile does, up to the code."""
    fakes = torch._guards.detect_fake_mode(inputs)
    compile_fx.view_to_reshape(graph)
    compile_fx._recursive_record_original_output_strides(graph)
    with V.set_fake_mode(fakes):
        compile_fx.fake_tensor_prop(graph, inputs)
        compile_fx._recursive_post_grad_passes(graph, is_inference=False)
    lowered = GraphLowering(graph)
    with V.set_graph_handler(lowered), V.set_fake_mode(fakes), V.set_debug_handler(DebugContext()):
        lowered.run(*inputs)
        lowered.init_wrapper_code()
        lowered._update_scheduler()
        found = Fused()
        for node in lowered.scheduler.nodes:
            inner = getattr(node, "node", None)
            if any(word in f"{type(node).__name__} {type(inner).__name__}" for word in _NO_KERNEL):
                continue
            found.num_kernels += 1
            name = str(getattr(inner, "op_overload", "")).split(".")[1:2]
            if not any(each.startswith(_OF_MATRICES) for each in name):
                found.elementwise_bytes += node.get_read_write_buffers_sizes()
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    found.outputs = [each.meta["val"] if isinstance(each, fx.Node) else each for each in output.args[0]]
    given = {_storage(node.meta["val"]) for node in graph.graph.nodes if node.op == "placeholder"}
    made = {_storage(each): each for each in found.outputs if isinstance(each, torch.Tensor)}
    found.made_bytes = sum(each.untyped_storage().nbytes() for key, each in made.items() if key not in given)
    return found


def _storage(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def main() -> None:
    """Print the figures of the shapes asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", default=",".join(step_traffic.SHAPES), help="names, with commas between (default: all)"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a pass (default: 4096)")
    given = parser.parse_args()
    found = {name: estimate(name, given.tokens) for name in given.shapes.split(",")}
    columns = list(next(iter(found.values())))
    print("shape (estimates)".ljust(18), *columns, sep="  ")
    for name, figures in found.items():
        print(name.ljust(18), *(str(figures[each]).rjust(len(each)) for each in columns), sep="  ")


if __name__ == "__main__":
    main()
