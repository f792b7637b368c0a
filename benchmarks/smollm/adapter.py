"""Make a LoRA folder on WORK/pretrained: from the committed one, or from a checkpoint of `readapt finetune`.

A checkpoint is taken whether or not its training is finished, and written in float16 with the encoding of the study.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from readapt_ray.storage import Location
from readapt_ray.training import dora

ENCODING = {
    "query_template": "query: {text}",
    "passage_template": "passage: {title} {text}",
    "pooling": "mean",
    "add_bos": False,
    "add_eos": False,
    "max_query_tokens": 32,
    "max_passage_tokens": 128,
}
TARGETS = ("down_proj", "k_proj", "q_proj", "up_proj", "v_proj")


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="what the adapter shall name as its base")
    parser.add_argument("--from", dest="source", type=Path, required=True, help="folder of an adapter, or a checkpoint")
    parser.add_argument("--alpha", type=float, default=16, help="of a checkpoint's adapter (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.source.is_dir():
        copy(options.source, options.output, options.base)
    else:
        from_checkpoint(options.source, options.output, options.base, options.alpha)


def copy(source: Path, output: Path, base: str) -> None:
    """Copy an adapter, but for the name of its base."""
    for name in ("adapter_model.safetensors", "readapt.json"):
        (output / name).write_bytes((source / name).read_bytes())
    config = json.loads((source / "adapter_config.json").read_text())
    text = json.dumps({**config, "base_model_name_or_path": base}, indent=2, sort_keys=True)
    (output / "adapter_config.json").write_text(text + "\n")


def from_checkpoint(file: Path, output: Path, base: str, alpha: float) -> None:
    """Keep the factors of a checkpoint, without the optimizer's state."""
    factors = {name: tensor for name, tensor in load_file(file).items() if "@" not in name}
    state = {f"base_model.model.{name}.weight": tensor.to(torch.float16) for name, tensor in sorted(factors.items())}
    rank = next(len(tensor) for name, tensor in factors.items() if name.endswith("lora_A"))
    shape = dora.AdapterShape(method="lora", rank=rank, alpha=alpha, dropout=0.0, targets=TARGETS)
    dora.save_adapter(Location(str(output)), state, shape, base=base, task_type="FEATURE_EXTRACTION")
    (output / "readapt.json").write_text(json.dumps({"encoding": ENCODING}, indent=2) + "\n")


if __name__ == "__main__":
    main()
