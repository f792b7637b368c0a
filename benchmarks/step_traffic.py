"""Count what a training step asks of a GPU, without one: kernels, arithmetic, bytes, saved activations, host syncs.

    python benchmarks/step_traffic.py                     # a table of all shapes
    python benchmarks/step_traffic.py --shapes mistral-7b --json
    python benchmarks/step_traffic.py --shapes mistral-7b --base-dtype nf4   # layers in 4 bits, decoded for each product
    python benchmarks/step_traffic.py --encoding --tokens 16384              # the forward pass of an encoder

Our own modules run on torch's meta device, whose tensors have shapes and no data, in packed mode with DoRA r32 on all
linear layers of a block, dropout 0.05 and a frozen bfloat16 base. Every operation that would start a kernel on CUDA is
counted, with the bytes of the tensors that it reads and writes. What CUDA does otherwise than the meta device is imitated:
the flash kernel, fused norms and dropout, and autocast's types. The optimizer is fused AdamW, 28 bytes per trained number.

These are counts, not times: caches and fused loads may save some of the bytes. Figures per layer are the difference between
a model of four layers and one of one layer. A GB is 10^9 bytes.
"""

import argparse
import collections
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.initialization import no_init_weights

from readapt_ray.nn import attention, gated, norms, quantized
from readapt_ray.nn.precision import products_in
from readapt_ray.retrieval.forward_pass import packed_inputs
from readapt_ray.training import dora, objectives, packing
from readapt_ray.training.packing import Batch, Block, Masking

DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": {"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": None},
    "llama-2-7b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "qwen3-0.6b": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
                   "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "modernbert-base": {"model_type": "modernbert"},
}  # fmt: skip
"""Configs by name; what is missing is the default of transformers, which are the published model's."""
NUM_LAYERS = {"mistral-7b": 32, "llama-2-7b": 32, "qwen3-0.6b": 28, "modernbert-base": 22}
TARGETS = dict.fromkeys(SHAPES, DECODER) | {"modernbert-base": ("Wqkv", "Wo", "Wi")}
FEW, MANY = 1, 4
"""Layers of the two models whose difference is counted; three more, since ModernBERT's layers repeat by three."""
PASSAGE_TOKENS = 80

_NO_KERNEL = frozenset(
    [
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "unsqueeze",
        "squeeze",
        "expand",
        "slice",
        "detach",
        "as_strided",
        "permute",
        "alias",
        "split",
        "reshape",
        "select",
        "unbind",
        "lift_fresh",
        "_reshape_alias",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "split_with_sizes",
        "chunk",
        "is_same_size",
        "_record_function_enter_new",
        "_record_function_exit",
    ]
)
_OVERWRITES = frozenset(["copy_", "fill_", "zero_", "bernoulli_", "random_", "uniform_", "normal_"])
"""In place, without reading what was there."""
_WAITS = frozenset(["_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2"])
"""The host waits for the device to know a value or a size."""
_KINDS = {
    "gemm": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_varlen_attn", "_varlen_attn_backward", "_flash_attention_forward", "_flash_attention_backward"),
    "norm": ("native_layer_norm", "native_layer_norm_backward", "_fused_rms_norm", "_fused_rms_norm_backward"),
    "dropout": ("native_dropout", "native_dropout_backward", "bernoulli"),
    "copy": ("copy", "_to_copy", "clone", "cat", "stack", "fill", "zero", "zeros", "zeros_like", "new_zeros", "ones_like"),
    "sum": ("sum", "mean", "linalg_vector_norm", "_log_softmax", "amax", "max"),
    "optimizer": ("fused_adamw",),
}  # fmt: skip
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}
_NOT_ELEMENTWISE = ("gemm", "attention")


@dataclass
class Count:
    """Kernels, bytes and arithmetic of some operations."""

    kernels: collections.Counter[str] = field(default_factory=collections.Counter)
    """Starts, by operation."""
    num_bytes: collections.Counter[str] = field(default_factory=collections.Counter)
    """Read and written, by kind."""
    gemm_flops: int = 0
    host_syncs: int = 0

    def add(self, name: str, num_bytes: int) -> None:
        """Count one kernel."""
        self.kernels[name] += 1
        self.num_bytes[_KIND_OF.get(name.rstrip("_"), _KIND_OF.get(name, "pointwise"))] += num_bytes

    @property
    def elementwise_bytes(self) -> int:
        """Bytes of all kernels but matrix products and attention."""
        return sum(size for kind, size in self.num_bytes.items() if kind not in _NOT_ELEMENTWISE)


def _span(tensor: Tensor) -> int:
    """Return the bytes of a tensor; what is broadcast is read once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


class _Counting(TorchDispatchMode):
    """Add every operation below autograd to a count."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if name in _NO_KERNEL:
            return func(*args, **(kwargs or {}))
        is_mask = name in ("index", "index_put_") and any(each.dtype == torch.bool for each in tree_leaves(args[1]))
        is_on_host = not is_mask and not any(each.is_meta for each in given)
        self.count.host_syncs += (name in _WAITS or is_mask) and not is_on_host
        if is_mask:  # as if all were chosen
            self.count.add("nonzero", given[1].nbytes)
            out = given[0].flatten(0, given[1].ndim - 1).clone()
        elif name == "_local_scalar_dense" and not is_on_host:
            return 0
        else:
            out = func(*args, **(kwargs or {}))
        overwritten = {id(each) for each in tree_leaves((kwargs or {}).get("out"))}
        read = given[1:] if name in _OVERWRITES else [each for each in given if id(each) not in overwritten]
        written = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        if not any(each.is_meta for each in (*given, *written)):
            return out
        self.count.add(name, sum(map(_span, read)) + sum(map(_span, written)))
        if _KIND_OF.get(name.rstrip("_")) == "gemm":
            left, right = args[-2:]
            self.count.gemm_flops += 2 * left.numel() * right.shape[-1]
        return out


class _FusedNorm(torch.autograd.Function):
    """CUDA's single kernels for root-mean-square norms, which the meta device takes apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        _AsOnCuda.count.add("_fused_rms_norm", 2 * x.nbytes + scale.nbytes)
        ctx.save_for_backward(x, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x, scale = ctx.saved_tensors
        _AsOnCuda.count.add("_fused_rms_norm_backward", gradients[0].nbytes + 2 * x.nbytes + scale.nbytes)
        return torch.empty_like(x)


class _Autocast(contextlib.ContextDecorator):
    """Stand in for torch.autocast, which refuses the meta device; `_AsOnCuda` casts as it would."""

    is_on = False

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **_: Any) -> None:  # noqa: ARG002
        self.enabled = enabled

    def __enter__(self) -> None:
        self.before, _Autocast.is_on = _Autocast.is_on, self.enabled

    def __exit__(self, *_: object) -> None:
        _Autocast.is_on = self.before


_IN_BFLOAT16 = {functional.linear, torch.matmul, torch.mm, torch.addmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm}
_IN_FLOAT32 = {functional.rms_norm, functional.layer_norm}


class _AsOnCuda(TorchFunctionMode):
    """Run norms and dropout as single kernels, and cast as CUDA's autocast does (torch's list for `CUDA Ops`)."""

    count = Count()
    """Of the passes that run now."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = torch.bfloat16 if func in _IN_BFLOAT16 else torch.float32 if func in _IN_FLOAT32 else None
        if _Autocast.is_on and wanted is not None:
            args = tuple(
                each.to(wanted) if isinstance(each, Tensor) and each.is_floating_point() else each for each in args
            )
        if func is functional.rms_norm:
            return _FusedNorm.apply(args[0])  # type: ignore[no-untyped-call]
        if func is functional.dropout and args[0].is_meta:
            if not kwargs["training"]:
                return args[0]
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def as_on_cuda(count: Count) -> Iterator[None]:
    """Inside, what runs on the meta device is added to `count` as the kernels that CUDA would start."""
    with (
        mock.patch.object(torch, "autocast", _Autocast),
        mock.patch.object(attention, "_KERNEL_DEVICE", "meta"),
        mock.patch.object(attention, "_is_able", lambda _: True),
        mock.patch.object(_AsOnCuda, "count", count),
        mock.patch.object(torch, "Generator", mock.Mock(**{"return_value.manual_seed.return_value": None})),
        _AsOnCuda(),
        _Counting(count),
    ):
        yield


def make_model(name: str, num_layers: int, base_dtype: Any = "auto", device: str = "meta") -> Any:
    """Return a language model of a shape with adapters, made ready as for training."""
    options = dict(SHAPES[name], num_hidden_layers=num_layers)
    config = AutoConfig.for_model(**options)
    auto = AutoModelForMaskedLM if name == "modernbert-base" else AutoModelForCausalLM
    with torch.device(device), no_init_weights():
        model = auto.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        objectives.prepare(model, name)
        norms.fuse(model)
        gated.fuse(model)
        quantized.quantize(model, base_dtype, torch.device(device))
        shape = dora.AdapterShape(method="dora", rank=32, alpha=64.0, dropout=0.05, targets=TARGETS[name])
        dora.add_adapters(model, shape)
    return model.train()


def make_batch(num_tokens: int, *, is_masked: bool, device: str = "meta") -> Batch:
    """Return passages of 80 tokens, end to end in one row."""
    lengths = [PASSAGE_TOKENS] * (num_tokens // PASSAGE_TOKENS)
    lengths += [num_tokens - sum(lengths)] if sum(lengths) < num_tokens else []
    passages = [Block(np.ones(length, np.int32), (length,), (number,)) for number, length in enumerate(lengths)]
    masking = Masking(mask_id=4, vocab_size=1000, seed=0) if is_masked else None
    return packing.collate(passages, pad_id=0, masking=masking).to(device)


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Return the loss of a batch, as a training worker computes it."""
    with products_in(torch.bfloat16, model, str(batch.input_ids.device)):
        return objectives.loss_sum(model, batch)


@dataclass
class Pass:
    """The counts of a forward and a backward pass."""

    forward: Count
    backward: Count
    saved_bytes: int

    @property
    def counts(self) -> tuple[Count, Count]:
        """The sum of both counts."""
        return self.forward, self.backward


def run_pass(model: Any, batch: Batch) -> Pass:
    """Run and count both passes. What autograd saves is counted once a storage, parameters and buffers left out."""
    forward, backward = Count(), Count()
    fixed = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers(), *vars(batch).values())
             if isinstance(each, Tensor)}  # fmt: skip
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in fixed:
            saved.setdefault(key, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each), as_on_cuda(forward):
        loss = loss_of(model, batch)
    saved_bytes = sum(each.untyped_storage().nbytes() for each in saved.values())
    with as_on_cuda(backward):
        loss.backward()
    return Pass(forward, backward, saved_bytes)


def run_update(model: nn.Module) -> Count:
    """Count what follows the passes of a step: clipping, fused AdamW (a kernel per 2^16 chunks), DoRA's norms."""
    count = Count()
    trained = [each for each in model.parameters() if each.requires_grad]
    with as_on_cuda(count):
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        count.add("fused_adamw", 7 * 4 * sum(each.numel() for each in trained))
        dora.refresh(model)
    return count


def _per_layer(few: float, many: float) -> float:
    return (many - few) / (MANY - FEW)


def measure(name: str, num_tokens: int, base_dtype: Any = "auto") -> dict[str, Any]:
    """Return every figure of a shape."""
    batch = make_batch(num_tokens, is_masked=name == "modernbert-base")
    models = [make_model(name, num, base_dtype) for num in (FEW, MANY)]
    few, many = (run_pass(model, batch) for model in models)
    update = [run_update(model) for model in models]

    def layer(value: Callable[[Count], float], *, pair: tuple[Any, Any] | None = None) -> list[float]:
        pairs = [pair] if pair else list(zip(few.counts, many.counts, strict=True))
        return [_per_layer(value(one), value(other)) for one, other in pairs]

    num_layers = NUM_LAYERS[name]

    def whole(value: Callable[[Count], float]) -> float:
        slope = sum(layer(value)) + sum(layer(value, pair=(update[0], update[1])))
        start = sum(value(each) for each in (*few.counts, update[0]))
        return start + (num_layers - FEW) * slope

    def num_kernels(count: Count) -> int:
        return count.kernels.total()

    kinds = sorted({kind for each in (*many.counts, *update) for kind in each.num_bytes})
    parts = dict(zip(("forward", "backward"), layer(lambda each: each.elementwise_bytes), strict=True))
    return {
        "shape": name,
        "num_tokens": num_tokens,
        "base_dtype": base_dtype,
        "kernels_per_layer": round(sum(layer(num_kernels)), 1),
        "elementwise_gb_per_layer": round(sum(parts.values()) / 1e9, 3),
        "elementwise_gb_by_pass": {part: round(size / 1e9, 3) for part, size in parts.items()},
        "gb_per_layer_by_kind": {
            kind: round(sum(layer(lambda each, kind=kind: each.num_bytes[kind])) / 1e9, 3)  # type: ignore[misc]
            for kind in kinds
        },
        "gemm_tflop_per_layer": round(sum(layer(lambda each: each.gemm_flops)) / 1e12, 3),
        "saved_kb_per_token_and_layer": round(_per_layer(few.saved_bytes, many.saved_bytes) / num_tokens / 1e3, 1),
        "host_syncs": sum(each.host_syncs for each in many.counts),
        "step": {
            "num_layers": num_layers,
            "kernels": round(whole(num_kernels)),
            "kernels_of_update": round(update[0].kernels.total() + (num_layers - FEW) * layer(num_kernels, pair=(update[0], update[1]))[0]),
            "elementwise_gb": round(whole(lambda each: each.elementwise_bytes) / 1e9, 2),
            "gemm_tflop": round(whole(lambda each: each.gemm_flops) / 1e12, 2),
        },
        "kernels_by_operation": {
            part: {op: round(_per_layer(one.kernels[op], other.kernels[op]), 2) for op, _ in other.kernels.most_common()
                   if other.kernels[op] != one.kernels[op]}
            for part, one, other in zip(("forward", "backward"), few.counts, many.counts, strict=True)
        },
    }  # fmt: skip


def measure_encoding(name: str, num_tokens: int) -> dict[str, Any]:
    """Return the figures of an encoder's forward pass, with passages of 80 tokens end to end."""
    rows = [np.ones(PASSAGE_TOKENS, np.int64)] * (num_tokens // PASSAGE_TOKENS)
    ids, positions, ends = (torch.from_numpy(each).to("meta") for each in packed_inputs(rows))
    counts = []
    for num_layers in (FEW, MANY):
        config = AutoConfig.for_model(**dict(SHAPES[name], num_hidden_layers=num_layers))
        with torch.device("meta"), no_init_weights():
            network = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        norms.fuse(network)
        attention.install(network, name)
        counts.append(Count())
        packed = {"cu_seq_lens_q": ends, "max_length_q": PASSAGE_TOKENS}
        with torch.no_grad(), as_on_cuda(counts[-1]):
            network(input_ids=ids, position_ids=positions, use_cache=False, **packed)
    few, many = counts
    return {
        "shape": name,
        "num_tokens": ids.numel(),
        "kernels_per_layer": round(_per_layer(few.kernels.total(), many.kernels.total()), 1),
        "elementwise_gb_per_layer": round(_per_layer(few.elementwise_bytes, many.elementwise_bytes) / 1e9, 3),
        "gemm_tflop_per_layer": round(_per_layer(few.gemm_flops, many.gemm_flops) / 1e12, 3),
        "host_syncs": many.host_syncs,
    }


def main() -> None:
    """Print the figures of the shapes asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="names, with commas between (default: all)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a pass (default: 4096)")
    parser.add_argument(
        "--base-dtype", choices=("auto", "int8", "nf4"), default="auto", help="as for train (default: auto)"
    )
    parser.add_argument("--encoding", action="store_true", help="count the forward pass of an encoder instead")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    given = parser.parse_args()
    names = given.shapes.split(",")
    if given.encoding:
        found = [measure_encoding(name, given.tokens) for name in names]
    else:
        found = [measure(name, given.tokens, given.base_dtype) for name in names]
    if given.json:
        print(json.dumps(found, indent=2))
        return
    shown = ("kernels_per_layer", "elementwise_gb_per_layer", "saved_kb_per_token_and_layer", "host_syncs")
    columns = [name for name in shown if name in found[0]]
    print("shape".ljust(16), *columns, sep="  ")
    for each in found:
        print(each["shape"].ljust(16), *(str(each[name]).rjust(len(name)) for name in columns), sep="  ")


if __name__ == "__main__":
    main()
