"""Compare DoRA's forward pass with one that multiplies by a merged weight: kernels, bytes, and loss after equal tokens.

    python benchmarks/merged_forward.py --counts-only
    python benchmarks/merged_forward.py --root /tmp/merged-forward --seeds 1

The merged weight W' = m / ||W + s B A|| * (W + s B A) is made once a step, in the type of W; the forward pass is x W'^T and
the gradient of x is g W'. The gradients of A, B and m are those of the unmerged pass. Dropout cannot be applied, since A's
input is W's, so both are compared without. A copy of all adapted weights is held beside the frozen ones. Counted as in
step_traffic.py and compiled_traffic.py, trained as in base_dtype.py. Writes JSON to --output.
"""

import argparse
import contextlib
import datetime
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent.parent))

import readapt_ray as ra
from benchmarks import base_dtype, compiled_traffic, step_traffic
from readapt_ray import hardware
from readapt_ray.catalog import models
from readapt_ray.nn.quantized import QuantizedLinear
from readapt_ray.recipes import quickstart
from readapt_ray.training import dora
from readapt_ray.training.adapted_output import column_products

SHAPE: Final = "mistral-7b"
TOKENS: Final = 4096


class MergedOutput(torch.autograd.Function):
    """x W'^T, with the gradients of `AdaptedOutput` without dropout."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        """Map [..., I] to [..., O]. Given are x, A, B, m, and of this step W', s A, d B and d, cast."""
        x, _, _, magnitude_O, merged_OI, scaled_A_RI, scaled_B_OR, share_O = given
        y = functional.linear(x, merged_OI)
        ctx.save_for_backward(x, y, magnitude_O, merged_OI, scaled_A_RI, scaled_B_OR, share_O)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A, B and m; the norm has none."""
        x, y, magnitude_O, merged_OI, scaled_A_RI, scaled_B_OR, share_O = ctx.saved_tensors
        gradient_NO, x_NI = gradients[0].flatten(0, -2), x.flatten(0, -2)
        magnitude_grad = column_products(gradient_NO, y.flatten(0, -2)).to(magnitude_O.dtype) / magnitude_O
        A_grad = (gradient_NO @ scaled_B_OR).T @ x_NI
        B_grad = (gradient_NO.T @ (x_NI @ scaled_A_RI.T)) * share_O[:, None]
        x_grad = (gradient_NO @ merged_OI).view_as(x)
        return x_grad, A_grad.to(magnitude_O.dtype), B_grad, magnitude_grad, None, None, None, None


class MergedLinear(dora.AdaptedLinear):
    """A layer whose forward pass is one product. The scale s of A's gradient is in `own_scaled_b`."""

    merged: Tensor
    own_scaled_a: Tensor
    own_scaled_b: Tensor
    share: Tensor

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the merged weight; call this after every change of the factors."""
        super().refresh()
        assert self.magnitude is not None and not isinstance(self.base, QuantizedLinear)
        weight_OI, s = self.base.weight, self.scaling
        share_O = self.magnitude / self.norm
        scaled_B = self.lora_B * share_O[:, None]
        # float32, rounded once; as one product that adds W and writes W' it would move the fewest bytes.
        update_OI = (s * scaled_B).to(weight_OI.dtype) @ self.lora_A.to(weight_OI.dtype)
        merged = torch.addcmul(update_OI, weight_OI, share_O[:, None].to(weight_OI.dtype))
        if not weight_OI.is_meta:
            merged = (share_O[:, None] * weight_OI.float() + s * scaled_B @ self.lora_A).to(weight_OI.dtype)
        self.register_buffer("merged", merged, persistent=False)
        self.register_buffer("own_scaled_a", (s * self.lora_A).to(weight_OI.dtype), persistent=False)
        self.register_buffer("own_scaled_b", (s * scaled_B).to(weight_OI.dtype), persistent=False)
        self.register_buffer("share", share_O, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        made = (self.merged, self.own_scaled_a, self.own_scaled_b, self.share)
        y: Tensor = MergedOutput.apply(x.to(self.merged.dtype), self.lora_A, self.lora_B, self.magnitude, *made)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


def merge_layers(model: nn.Module) -> None:
    """Let every adapted layer of a model use a merged weight."""
    for _, layer in dora.adapted_layers(model):
        layer.__class__ = MergedLinear
        with step_traffic.as_on_cuda(step_traffic.Count()) if layer.lora_A.is_meta else contextlib.nullcontext():
            layer.refresh()


def drop_dropout(model: nn.Module) -> None:
    """Train adapters without dropout."""
    for _, layer in dora.adapted_layers(model):
        layer.dropout = 0.0


@contextlib.contextmanager
def changed_models(change: Callable[[nn.Module], None]) -> Iterator[None]:
    """Inside, models to be counted are changed when they are made."""
    make = step_traffic.make_model

    def make_changed(*args: Any, **given: Any) -> Any:
        model = make(*args, **given)
        change(model)
        return model

    with mock.patch.object(step_traffic, "make_model", make_changed):
        yield


ARMS: Final[dict[str, Callable[[nn.Module], None]]] = {
    "dropout 0.05": lambda _: None,
    "no dropout": drop_dropout,
    "merged": merge_layers,
}


def counts() -> dict[str, Any]:
    """Return what a layer of a 7B model asks of a GPU, by arm."""
    found = {}
    for name, change in ARMS.items():
        with changed_models(change):
            eager = step_traffic.measure(SHAPE, TOKENS)
            compiled = compiled_traffic.estimate(SHAPE, TOKENS)
            update = [step_traffic.run_update(step_traffic.make_model(SHAPE, num)) for num in (1, 2)]
        names = (*compiled, "gemm_tflop_per_layer")
        found[name] = {
            **{each: eager[each] for each in names},
            "compiled": compiled,
            "update_gb_per_layer": round((update[1].elementwise_bytes - update[0].elementwise_bytes) / 1e9, 3),
        }
    return found


def train(root: Path, num_seeds: int, num_passages: int) -> dict[str, Any]:
    """Return the loss on withheld passages after equal tokens, by arm and seed, in bfloat16."""
    recipe = quickstart.recipe(str(root))
    corpus = ra.ingest(ra.IngestConfig(source=recipe.source, output=f"{root}/corpus"))
    texts, withheld = base_dtype.split_texts(corpus, num_passages, num_withheld=200)
    model = models.open_model(recipe.pretrained)
    found: dict[str, Any] = {"num_passages": num_passages}
    for name, change in list(ARMS.items())[1:]:
        found[name] = []
        for seed in range(num_seeds):
            output = root / f"{name.replace(' ', '-')}-{seed}"
            base_dtype.train(model, texts, "bfloat16", output, seed=seed, change=change)
            found[name].append(base_dtype.withheld_losses(model, output, withheld))
    return found


def main() -> None:
    """Count, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder of the artifacts (default: a temporary one)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each arm (default: %(default)s)")
    parser.add_argument("--passages", type=int, default=1000, help="to train on (default: %(default)s)")
    parser.add_argument("--counts-only", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/merged_forward.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python benchmarks/merged_forward.py",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info()["driver"],
        "counts": counts(),
    }
    print(json.dumps(result["counts"], indent=2))
    if not options.counts_only:
        root = options.root or Path(tempfile.mkdtemp())
        result["losses"] = train(root, options.seeds, options.passages)
        print(json.dumps(result["losses"], indent=2))
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
