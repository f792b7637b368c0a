"""How much memory a merge takes, as the system counts it in a process of its own."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from readapt_ray.weights.weight_files import file_header

SIDE = 2048
MERGE = """
import json, sys, threading
from pathlib import Path
from readapt_ray.storage import Location
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.weight_files import Checkpoint
from readapt_ray.weights.export import plan_shards, write_weights
from readapt_ray.weights.merging import Readapter, Scales

def merge(folder):
    before = Checkpoint(folder / "pre")
    after = Checkpoint(folder / "ret")
    knowledge = [Adapter(folder / "ad", before)] if (folder / "ad").is_dir() else [Checkpoint(folder / "tuned")]
    made = Readapter(before, after, knowledge)
    plan = plan_shards(made, dtype="retriever", max_shard_bytes=30_000_000)
    write_weights(made, Scales(0.9, (0.5,)), plan, Location(str(folder / "out")), report=lambda done: None)

def megabytes(kind):
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(kind))
    return int(line.split()[1]) * 1024 / 1e6

warm, folder = map(Path, sys.argv[1:3])
merge(warm)  # what the interpreter and its libraries take, they have now
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
before = megabytes("VmRSS")
merge(folder)
print(json.dumps({"peak": megabytes("VmHWM") - before}))
"""


def _checkpoint(folder, names, side, seed):
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(file_header((name, torch.bfloat16, (side, side)) for name in names))
        for _ in names:
            weight = torch.randn(side, side, generator=generator)
            file.write(weight.bfloat16().view(torch.uint8).numpy().data)


def _models(root, num_tensors, side, kind):
    names = [f"layers.{number}.mlp.up_proj.weight" for number in range(num_tensors)]
    for seed, name in enumerate(("pre", "ret", "tuned")):
        _checkpoint(root / name, names, side, seed)
    if kind == "dora":
        from safetensors.torch import save_file

        (root / "ad").mkdir()
        tensors = {}
        for name in names:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(32, side)
            tensors[f"{module}.lora_B.weight"] = torch.randn(side, 32)
            tensors[f"{module}.lora_magnitude_vector"] = torch.ones(side)
        save_file(tensors, root / "ad/adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 32, "lora_alpha": 64, "use_dora": True}
        (root / "ad/adapter_config.json").write_text(json.dumps(config))
    return root


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("kind", ["full", "dora"])
def test_three_times_the_largest_tensor_whatever_the_size_of_the_model(tmp_path, kind):
    warm = _models(tmp_path / "warm", 2, 640, kind)  # large enough for the same routines of the libraries
    peaks = []
    for num_tensors in (2, 6):
        folder = _models(tmp_path / f"{num_tensors}", num_tensors, SIDE, kind)
        command = [sys.executable, "-c", MERGE, str(warm), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(json.loads(done.stdout)["peak"])
        shutil.rmtree(warm / "out", ignore_errors=True)
    largest_mb = 4 * SIDE * SIDE / 1e6
    assert max(peaks) <= 3 * largest_mb
    assert max(peaks) > 0.1 * largest_mb  # it was measured at all
