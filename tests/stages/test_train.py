"""train and finetune on real Ray Train workers under DeepSpeed, with real kills."""

import threading
import time
from pathlib import Path
from typing import Any

import peft
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from readapt_ray.artifacts import Artifact
from readapt_ray.errors import ArtifactMissingError, CorpusError, ModelError, PlacementError
from readapt_ray.recipes import train_on_passages
from readapt_ray.stages.finetune import FinetuneConfig, finetune
from readapt_ray.stages.pack import PackConfig, pack
from readapt_ray.stages.train import TrainConfig, train
from readapt_ray.stages.workers import read_metrics
from tests import factories

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny pretrained model, and 160 passages in blocks."""
    from readapt_ray.stages import cluster

    cluster.connect()
    folder = tmp_path_factory.mktemp("train")
    base = factories.tiny_decoder(folder / "base")
    factories.ingest_artifact(folder / "corpus", factories.small_corpus(160))
    pack(
        PackConfig(
            pretrained=str(base),
            corpus=str(folder / "corpus"),
            output=str(folder / "blocks"),
            mode="packed",
            block_tokens=64,
        )
    )
    return base, folder / "blocks"


def trained(packed: tuple[Path, Path], output: Path, **options: Any) -> Artifact:
    base, blocks = packed
    values: dict[str, Any] = {
        "num_workers": 1,
        "num_cpus_per_worker": 1,
        "learning_rate": 5e-3,
        "lora_dropout": 0.0,
        "dtype": "float32",
    }
    return train(TrainConfig(pretrained=str(base), corpus=str(blocks), output=str(output), **{**values, **options}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.fixture(scope="module")
def reference(packed: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of one worker."""
    folder = tmp_path_factory.mktemp("reference") / "adapter"
    trained(packed, folder)
    return folder


def test_the_adapter_learns_and_loads_in_plain_peft(packed: tuple[Path, Path], reference: Path) -> None:
    from readapt_ray.storage import Location

    losses = [row["loss"] for row in read_metrics(Location(str(reference)))]
    assert len(losses) > 20
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.2
    plain = AutoModelForCausalLM.from_pretrained(packed[0])
    model = peft.PeftModel.from_pretrained(plain, str(reference)).eval()
    ids = torch.tensor([[0, 9, 12, 5]])
    loaded = peft.get_peft_model_state_dict(model)
    saved = weights(reference)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert any("magnitude" in name for name in saved)
    with torch.no_grad(), model.disable_adapter():
        without = model(ids).logits
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, without, atol=1e-3)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_two_workers_equal_one(packed: tuple[Path, Path], reference: Path, tmp_path: Path, zero_stage: int) -> None:
    trained(packed, tmp_path / "a", num_workers=2, zero_stage=zero_stage)
    assert largest_difference(reference, tmp_path / "a") < 2e-3


def worker_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any("RayTrainWorker" in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_worker_killed_in_mid_epoch_changes_nothing(
    packed: tuple[Path, Path], tmp_path: Path, zero_stage: int
) -> None:
    """SIGKILL after the first checkpoint; the rest is trained from there, with dropout, to the same adapter."""
    options = {"num_workers": 2, "checkpoint_every_steps": 5, "lora_dropout": 0.1, "zero_stage": zero_stage}
    trained(packed, tmp_path / "calm", **options)
    calm = {process.pid for process in worker_processes()}
    killed = []

    def kill() -> None:
        checkpoints = tmp_path / "hit" / "checkpoints"
        while not (checkpoints.is_dir() and list(checkpoints.glob("step-*"))):
            time.sleep(0.02)
        while not (victims := [process for process in worker_processes() if process.pid not in calm]):
            time.sleep(0.02)
        victims[-1].kill()
        killed.append(victims[-1].pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    trained(packed, tmp_path / "hit", **options)
    killer.join(timeout=5)
    assert killed
    assert largest_difference(tmp_path / "calm", tmp_path / "hit") < 1e-5


def test_all_weights_can_be_trained(packed: tuple[Path, Path], tmp_path: Path) -> None:
    trained(packed, tmp_path / "full", method="full", learning_rate=1e-3)
    before = AutoModelForCausalLM.from_pretrained(packed[0])
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    names = [name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])]
    assert len(names) == len(before.state_dict())


def test_passages_are_packed_on_the_way(packed: tuple[Path, Path], tmp_path: Path) -> None:
    base, blocks = packed
    corpus = str(blocks.parent / "corpus")
    artifact = train_on_passages(
        TrainConfig(
            pretrained=str(base),
            corpus=corpus,
            output=str(tmp_path / "adapter"),
            block_tokens=64,
            batch_size=32,
            num_workers=1,
            num_cpus_per_worker=1,
        )
    )
    assert artifact.manifest.counts["num_passages"] == 160
    assert (tmp_path / "adapter-blocks" / "manifest.json").is_file()


def test_bad_input_is_refused_before_any_worker(packed: tuple[Path, Path], tmp_path: Path) -> None:
    base, blocks = packed
    with pytest.raises(ArtifactMissingError, match="does not exist"):
        trained((base, tmp_path / "absent"), tmp_path / "a")
    with pytest.raises(ModelError, match="not a folder"):
        trained((tmp_path / "absent", blocks), tmp_path / "a")
    with pytest.raises(ModelError, match=r"neither config\.json"):
        trained((blocks, blocks), tmp_path / "a")
    with pytest.raises(PlacementError, match="the cluster has 2"):
        trained(packed, tmp_path / "b", num_workers=5)
    corpus = str(blocks.parent / "corpus")
    with pytest.raises(ModelError, match="block_tokens = 100000 is more than"):
        pack(PackConfig(pretrained=str(base), corpus=corpus, output=str(tmp_path / "c"), block_tokens=100_000))


def test_target_modules_that_match_nothing_come_out_as_our_error(packed: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\['nothing'\] match no linear layer; the model has"):
        trained(packed, tmp_path / "a", target_modules=("nothing",), max_failures=0)


def test_finetuning_learns_and_two_workers_equal_one(packed: tuple[Path, Path], tmp_path: Path) -> None:
    passages = factories.small_corpus(120)
    queries, qrels = factories.small_queries(passages, 40)
    factories.ingest_artifact(tmp_path / "corpus", passages, queries, qrels, split="train")
    base = factories.tiny_decoder(tmp_path / "base")
    factories.write_contract(base, pooling="last", add_bos=True, add_eos=True)
    for count in (1, 2):
        artifact = finetune(
            FinetuneConfig(
                model=str(base),
                corpus=str(tmp_path / "corpus"),
                output=str(tmp_path / f"r{count}"),
                batch_size=10,
                num_epochs=6,
                learning_rate=5e-3,
                both_directions=True,
                dtype="float32",
                num_workers=count,
                num_cpus_per_worker=1,
            )
        )
        assert artifact.manifest.counts["num_pairs"] == 240
    losses = [row["loss"] for row in read_metrics(artifact.location)]
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.3
    assert largest_difference(tmp_path / "r1", tmp_path / "r2") < 5e-3
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(tmp_path / "r1"))
    assert peft.get_peft_model_state_dict(model).keys() == weights(tmp_path / "r1").keys()
    with pytest.raises(CorpusError, match=r"no qrels of the split 'dev'; it has \['train'\]"):
        finetune(
            FinetuneConfig(model=str(base), corpus=str(tmp_path / "corpus"), output=str(tmp_path / "x"), split="dev")
        )
