"""train on real Ray Train workers under DeepSpeed, with real kills."""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from readapt_ray.artifacts import Artifact, open_artifact
from readapt_ray.catalog.models import open_model
from readapt_ray.catalog.shapes import pretrained_shape
from readapt_ray.cluster.step_metrics import read_metrics
from readapt_ray.errors import (
    ArtifactMissingError,
    CorpusError,
    InputError,
    ModelError,
    PlacementError,
    TrainingDivergedError,
)
from readapt_ray.planner.machines import Cluster, NodeGroup
from readapt_ray.planner.worker_memory import train_memory
from readapt_ray.recipes.chain import train_on_passages
from readapt_ray.stages import train as train_stage
from readapt_ray.stages.finetune import FinetuneConfig, finetune
from readapt_ray.stages.pack import PackConfig, pack
from readapt_ray.stages.train import TrainConfig, check_pretrained, train
from readapt_ray.storage import Location
from readapt_ray.training.checkpoints import CheckpointWriter
from tests import factories

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny pretrained model, and 160 passages in blocks."""
    from readapt_ray.cluster import connection

    connection.connect()
    return factories.packed_corpus(tmp_path_factory.mktemp("train"))


def trained(packed: tuple[Path, Path], output: Path, **options: Any) -> Artifact:
    base, blocks = packed
    values: dict[str, Any] = {
        "num_workers": 1,
        "num_cpus_per_worker": 1,
        "learning_rate": 5e-3,
        "dtype": "float32",
        **({} if options.get("method") == "full" else {"lora_dropout": 0.0}),
    }
    return train(TrainConfig(pretrained=str(base), corpus=str(blocks), output=str(output), **{**values, **options}))


def test_a_batch_that_cannot_feed_every_worker_is_refused_with_the_number_that_would(
    packed: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(PlacementError, match=r"batch_size = 1 blocks cannot feed 2 workers: give batch_size 2 or more"):
        trained(packed, tmp_path / "a", num_workers=2, batch_size=1)


@pytest.mark.slow
def test_a_batch_size_of_our_choice_and_its_learning_rate_are_in_the_manifest(
    packed: tuple[Path, Path], tmp_path: Path
) -> None:
    """160 passages are few for 500 steps: one block per worker and step, and the rate stays that of 4 passages."""
    artifact = trained(packed, tmp_path / "a", num_workers=2, batch_size="auto", learning_rate=1e-3)
    details = artifact.manifest.details
    assert (details["batch_size"], details["num_workers"], details["learning_rate"]) == (2, 2, 1e-3)
    assert artifact.manifest.counts["num_steps"] == 80 == len(read_metrics(artifact.location))


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


@pytest.mark.slow
@pytest.mark.parametrize("base_dtype", ["int8", "nf4"])
def test_an_adapter_of_a_quantized_base_fits_the_full_precision_model(
    packed: tuple[Path, Path], reference: Path, tmp_path: Path, base_dtype: str
) -> None:
    """Its losses while it trains, and those of the full-precision model with it, are those of a base in float32."""
    from readapt_ray.catalog.models import open_model
    from readapt_ray.storage import Location
    from readapt_ray.training.withheld_loss import losses

    trained(packed, tmp_path / "a", base_dtype=base_dtype, gradient_checkpointing=True)
    while_trained = [[row["loss"] for row in read_metrics(Location(str(each)))] for each in (reference, tmp_path / "a")]
    assert while_trained[0] != while_trained[1]
    assert while_trained[1] == pytest.approx(while_trained[0], rel=0.01)
    texts = [f"{passage.title} {passage.text}" for passage in factories.small_corpus(20)]
    options: Any = {"objective": "causal_lm", "max_tokens": 64, "dtype": torch.float32, "device": torch.device("cpu")}
    base = open_model(str(packed[0]))
    plain, quantized = (losses(base, open_model(str(each)), texts, **options) for each in (reference, tmp_path / "a"))
    assert plain[1].mean() < plain[0].mean() - 0.2
    assert quantized[1].mean() == pytest.approx(plain[1].mean(), rel=0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "full"}, "base_dtype = int8 freezes the weights that method = full trains"),
        ({"zero_stage": 3}, "base_dtype = int8 does not go with zero_stage = 3"),
    ],
)
def test_what_does_not_go_with_a_quantized_base_is_refused_by_name(options: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        TrainConfig(pretrained="m", corpus="c", output="o", base_dtype="int8", **options)


def test_what_a_base_dtype_needs_is_checked_before_anything_is_packed(
    packed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(base_dtype: str) -> None:
        raise InputError(f"{base_dtype} needs a package")

    monkeypatch.setattr("readapt_ray.nn.quantized.check_installed", missing)
    with pytest.raises(InputError, match="nf4 needs a package"):
        check_pretrained(TrainConfig(pretrained=str(packed[0]), corpus="c", output="o", base_dtype="nf4"))
    with pytest.raises(InputError, match="int8 needs a package"):
        finetune(FinetuneConfig(model=str(packed[0]), corpus="c", output="o", base_dtype="int8"))


@pytest.mark.parametrize("zero_stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2)), 3])
def test_two_workers_equal_one(packed: tuple[Path, Path], reference: Path, tmp_path: Path, zero_stage: int) -> None:
    trained(packed, tmp_path / "a", num_workers=2, zero_stage=zero_stage)
    assert largest_difference(reference, tmp_path / "a") < 2e-3


@pytest.mark.gpu
def test_on_a_gpu_every_zero_stage_trains_the_same_adapter(packed: tuple[Path, Path], tmp_path: Path) -> None:
    from readapt_ray.storage import Location

    for zero_stage in (0, 2, 3):
        made = trained(packed, tmp_path / str(zero_stage), zero_stage=zero_stage)
        assert made.manifest.hardware["cluster"]["gpus"]
        rows = read_metrics(Location(str(tmp_path / str(zero_stage))))
        assert sum(row["loss"] for row in rows[-5:]) < sum(row["loss"] for row in rows[:5]) - 1
        assert rows[-1]["mfu"] > 0
        assert largest_difference(tmp_path / "0", tmp_path / str(zero_stage)) < 2e-3
    trained(packed, tmp_path / "low", dtype="auto", torch_compile=True, gradient_checkpointing=True)
    losses = [[row["loss"] for row in read_metrics(Location(str(tmp_path / name)))] for name in ("0", "low")]
    assert max(abs(one - other) for one, other in zip(*losses, strict=True)) < 0.05


def worker_processes() -> set[int]:
    """The Ray Train workers that this test's own Ray runs now; other Rays of the machine are left alone."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if any("RayTrainWorker" in part for part in process.cmdline()):
                found.add(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def work_until_killed(job: dict[str, Any]) -> None:
    """Go no further than to the first checkpoint, until a worker was killed."""
    from readapt_ray.stages.train import _work

    save, mark = CheckpointWriter.save, Location(job["output"]).local_path.with_name("killed")

    def saved(writer: CheckpointWriter, *given: Any) -> None:
        save(writer, *given)
        writer.wait()
        while not mark.exists():
            time.sleep(0.02)

    CheckpointWriter.save = saved  # type: ignore[method-assign]
    _work(job)


@contextlib.contextmanager
def one_worker_killed(checkpoints: Path) -> Iterator[set[int]]:
    """Kill a worker once the first checkpoint is there; yield the processes that are started after it."""
    mark = checkpoints.parent.with_name("killed")
    left_over = worker_processes()
    killed: set[int] = set()
    started_again: set[int] = set()
    done = threading.Event()

    def kill_one_and_watch() -> None:
        while not done.wait(0.02):
            own = worker_processes() - left_over
            if not killed and own and list(checkpoints.glob("step-*")):
                victim = max(own)
                os.kill(victim, signal.SIGKILL)
                killed.add(victim)
                left_over.update(own)
                mark.touch()
            elif killed:
                started_again.update(own)

    killer = threading.Thread(target=kill_one_and_watch, daemon=True)
    killer.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[train.__module__], "_work", work_until_killed)
        yield started_again
    done.set()
    killer.join()
    assert killed


def test_a_killed_worker_goes_on_from_its_checkpoint(
    packed: tuple[Path, Path], reference: Path, tmp_path: Path
) -> None:
    with one_worker_killed(tmp_path / "hit" / "checkpoints") as started_again:
        trained(packed, tmp_path / "hit", checkpoint_every_s=0)
    assert started_again
    assert largest_difference(reference, tmp_path / "hit") == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_worker_killed_in_mid_epoch_changes_nothing(
    packed: tuple[Path, Path], tmp_path: Path, zero_stage: int
) -> None:
    """One of two; the rest is trained from the checkpoint, with dropout, to the same adapter."""
    options = {"num_workers": 2, "checkpoint_every_s": 0, "lora_dropout": 0.1, "zero_stage": zero_stage}
    calm = trained(packed, tmp_path / "calm", **options)
    with one_worker_killed(tmp_path / "hit" / "checkpoints") as started_again:
        hit = trained(packed, tmp_path / "hit", **options)
    assert len(started_again) >= 2
    assert largest_difference(tmp_path / "calm", tmp_path / "hit") == 0
    rows, expected = read_metrics(hit.location), read_metrics(calm.location)
    assert [(row["step"], row["loss"]) for row in rows] == [(row["step"], row["loss"]) for row in expected]


@pytest.mark.slow
@pytest.mark.parametrize("second", [1, 2])
def test_a_run_goes_on_with_another_number_of_workers(
    packed: tuple[Path, Path], reference: Path, tmp_path: Path, second: int
) -> None:
    """The first run ends early, by a step that fails; the second one takes the rest and no step twice."""
    target = tmp_path / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("readapt_ray.cluster.step_metrics.join", _out_of_space)
        with pytest.raises(OSError, match="no space"):
            trained(packed, target, num_workers=3 - second, checkpoint_every_s=0, keep_checkpoints=100)
    for file in sorted((target / "checkpoints").iterdir())[28:]:
        file.write_bytes(file.read_bytes()[:-10])  # as a cut write would leave it, were writes not atomic
    artifact = trained(packed, target, num_workers=second, checkpoint_every_s=0)
    rows = read_metrics(artifact.location)
    assert [row["step"] for row in rows] == list(range(1, rows[-1]["num_steps"] + 1))
    assert sum(row["num_passages"] for row in rows) == 160
    assert largest_difference(reference, target) < 2e-3


def _out_of_space(*_: object) -> None:
    raise OSError("no space left on device")


def test_every_step_tells_what_it_cost(reference: Path) -> None:
    from readapt_ray.storage import Location

    rows = read_metrics(Location(str(reference)))
    for row in rows:
        assert 0 <= row["padding_share"] < 1
        assert 0 <= row["data_wait_s"] <= row["seconds"]
        assert row["tokens_per_s"] == pytest.approx(row["num_tokens"] / row["seconds"])
        assert row["peak_memory_bytes"] > 1e8
        assert row["gradient_norm"] > 0
        assert row["mfu"] is None  # no CPU's peak is known
    assert rows[0]["learning_rate"] == 5e-3
    assert rows[-1]["learning_rate"] == pytest.approx(5e-3 / len(rows))


def test_a_plan_counts_the_bytes_that_the_worker_counted(packed: tuple[Path, Path], reference: Path) -> None:
    base, blocks = packed
    node = NodeGroup(name="node", count=1, cpus=1, memory_bytes=1e10)
    config = TrainConfig(pretrained=str(base), corpus=str(blocks), output="o", lora_dropout=0.0, dtype="float32")
    config = config.model_copy(
        update={"block_tokens": open_artifact(str(blocks), "pack").manifest.config["block_tokens"]}
    )
    planned = train_memory(config, pretrained_shape(str(base)), Cluster(name="c", groups=(node,)), 1)
    assert planned.parts == json.loads((reference / "memory.json").read_text())["parts"]


@pytest.mark.slow
def test_checkpointed_activations_and_trackers_change_nothing(
    packed: tuple[Path, Path], reference: Path, tmp_path: Path
) -> None:
    trained(packed, tmp_path / "a", gradient_checkpointing=True, trackers=("tensorboard",))
    assert largest_difference(reference, tmp_path / "a") < 1e-5
    assert list((tmp_path / "a" / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_an_encoder_learns_its_masked_tokens(tmp_path: Path) -> None:
    base = factories.tiny_encoder(tmp_path / "base")
    # With random embeddings of BERT's size every token has about the same chance, whatever an adapter does.
    stored = load_file(base / "model.safetensors")
    stored["bert.embeddings.word_embeddings.weight"] *= 10
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    factories.ingest_artifact(tmp_path / "corpus", factories.small_corpus(160))
    config = PackConfig(
        pretrained=str(base), corpus=str(tmp_path / "corpus"), output=str(tmp_path / "blocks"), block_tokens=64
    )
    pack(config)
    blocks = (base, tmp_path / "blocks")
    artifact = trained(blocks, tmp_path / "a", batch_size=8, num_epochs=4, learning_rate=1e-2)
    losses = [row["loss"] for row in read_metrics(artifact.location)]
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.2
    assert artifact.manifest.config["objective"] == "masked_lm"
    model = peft.PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(base), str(tmp_path / "a"))
    loaded, saved = peft.get_peft_model_state_dict(model), weights(tmp_path / "a")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)


def test_what_does_not_fit_is_refused_with_the_arithmetic(packed: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"would need about .* activations .*1,000,000,000,000 tokens"):
        trained(packed, tmp_path / "a", micro_batch_tokens=10**12)


@pytest.mark.slow
def test_a_loss_that_is_no_number_names_step_and_passages(tmp_path: Path) -> None:
    base, root = factories.tiny_decoder(tmp_path / "base"), tmp_path / "root"
    factories.ingest_artifact(root / "corpus", factories.small_corpus(24))
    pack(PackConfig(pretrained=str(base), corpus=str(root / "corpus"), output=str(root / "blocks"), block_tokens=64))
    root.rename(tmp_path / "moved")
    tensors = factories.read_tensors(base)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    factories.write_tensors(base, tensors)
    with pytest.raises(TrainingDivergedError, match=r"step 1: the loss became nan; passages of the step: 'd000\d\d'"):
        trained((base, tmp_path / "moved/blocks"), tmp_path / "a", lora_rank=2, method="lora")


def test_ids_of_passages_are_found_in_a_moved_corpus_and_not_in_another(
    packed: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("corpus", "blocks"):
        shutil.copytree(packed[1].parent / name, tmp_path / "copy" / name)
    manifest = json.loads((tmp_path / "copy/blocks/manifest.json").read_text())
    gone = {"corpus": str(tmp_path / "root/corpus"), "output": str(tmp_path / "root/blocks")}
    manifest["config"] |= gone
    (tmp_path / "copy/blocks/manifest.json").write_text(json.dumps(manifest))

    def ids() -> list[str]:
        blocks = open_artifact(str(tmp_path / "copy/blocks"), "pack")
        return train_stage._doc_ids(train_stage._passages(blocks))([3, 159])

    assert ids() == ["'d00003'", "'d00159'"]
    factories.ingest_artifact(tmp_path / "root/corpus", factories.small_corpus(160, seed=1))
    assert ids() == ["'d00003'", "'d00159'"]
    shutil.rmtree(tmp_path / "copy/corpus")
    assert ids() == ["number 3", "number 159"]
    shutil.rmtree(tmp_path / "root/corpus")
    assert ids() == ["number 3", "number 159"]


def test_withheld_passages_bear_no_loss(packed: tuple[Path, Path], tmp_path: Path) -> None:
    base, blocks = packed
    (tmp_path / "some.txt").write_text("d00003\nd00007\n")
    common = {"pretrained": str(base), "corpus": str(blocks.parent / "corpus"), "block_tokens": 64}
    without = pack(PackConfig(output=str(tmp_path / "w"), exclude=str(tmp_path / "some.txt"), **common))
    with_only = pack(PackConfig(output=str(tmp_path / "o"), only=str(tmp_path / "some.txt"), **common))

    def numbers(artifact: Artifact) -> list[int]:
        return sorted(
            pq.read_table(str(artifact.location.local_path / "blocks"))["passage_numbers"]
            .combine_chunks()
            .flatten()
            .to_pylist()
        )

    assert numbers(with_only) == [3, 7]
    assert numbers(without) == [number for number in range(160) if number not in (3, 7)]
    with pytest.raises(CorpusError, match=r"only = 'other.txt', but .* was packed with only = .*some.txt"):
        trained((base, tmp_path / "o"), tmp_path / "a", only="other.txt")
    with pytest.raises(CorpusError, match=r"mode = 'packed', but .* was packed with mode = 'passage'; pack again"):
        trained((base, tmp_path / "o"), tmp_path / "a", mode="packed", block_tokens=64)
    with pytest.raises(CorpusError, match=r"block_tokens = 128, but .* was packed with block_tokens = 64"):
        trained((base, tmp_path / "o"), tmp_path / "a", mode="passage", block_tokens=128)


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
    with pytest.raises(PlacementError, match="5 workers of 1 CPU each cannot be placed: there is room for 2"):
        trained(packed, tmp_path / "b", num_workers=5, batch_size=5)
    corpus = str(blocks.parent / "corpus")
    with pytest.raises(ModelError, match="block_tokens = 100000 is more than"):
        pack(PackConfig(pretrained=str(base), corpus=corpus, output=str(tmp_path / "c"), block_tokens=100_000))


def test_a_quantized_model_is_refused_before_any_worker(packed: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(packed[0], tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is quantized \(quantization_config in its config.json: bitsandbytes\)"):
        trained((tmp_path / "base", packed[1]), tmp_path / "out")


def test_rows_are_filled_with_a_token_that_the_model_has(packed: tuple[Path, Path], tmp_path: Path) -> None:
    """Some tokenizers have a token for padding that the model has no embedding of."""
    model = open_model(str(packed[0]))
    model.tokenizer.add_special_tokens({"pad_token": "[A NEW ONE]"})
    assert model.tokenizer.pad_token_id >= model.config["vocab_size"]
    config = TrainConfig(pretrained="", corpus="", output="", objective="causal_lm")
    blocks = open_artifact(str(packed[1]), "pack").location / "blocks"
    stream = train_stage._stream(config, model, blocks, Location(str(tmp_path)))
    assert stream._batch_settings.pad_id == model.tokenizer.eos_token_id


@pytest.mark.slow
def test_target_modules_that_match_nothing_come_out_as_our_error(packed: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\['nothing'\] match no linear layer; the model has"):
        trained(packed, tmp_path / "a", target_modules=("nothing",), max_failures=0)


@pytest.fixture(scope="module")
def grown(packed: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model, and in blocks what a later state of the corpus has that the first has not."""
    base, blocks = packed
    folder = tmp_path_factory.mktemp("grown")
    first = factories.small_corpus(160)
    changed = first[5]._replace(text=f"{first[5].text} It was changed.")
    added = [each._replace(doc_id=f"new-{each.doc_id}") for each in factories.small_corpus(40, seed=9)]
    same_text = first[7]._replace(doc_id="another-id")
    factories.ingest_artifact(folder / "corpus", [*first[:5], changed, *first[6:100], *added, same_text])
    options = {"mode": "packed", "block_tokens": 64, "new_since": str(blocks.parent / "corpus")}
    made = pack(
        PackConfig(pretrained=str(base), corpus=str(folder / "corpus"), output=str(folder / "blocks"), **options)
    )
    new = len({each.text for each in added} - {each.text for each in first})
    assert made.manifest.counts["num_passages"] == 1 + new > 20
    assert made.manifest.counts["num_withheld_passages"] == 141 - 1 - new
    return base, folder / "blocks"


@pytest.mark.slow
def test_an_adapter_goes_on_from_an_earlier_one(
    packed: tuple[Path, Path], grown: tuple[Path, Path], reference: Path, tmp_path: Path
) -> None:
    """At a learning rate of almost nothing it is the earlier one; at a real one it goes on from there, also when killed."""
    still = trained(grown, tmp_path / "still", continue_from=str(reference), learning_rate=1e-12)
    assert largest_difference(reference, tmp_path / "still") < 1e-9
    assert still.manifest.inputs["continue_from"] == open_artifact(str(reference), "train").fingerprint
    made = trained(grown, tmp_path / "calm", continue_from=str(reference), learning_rate=1e-3)
    anew = trained(grown, tmp_path / "anew", learning_rate=1e-3)
    first_losses = [read_metrics(each.location)[0]["loss"] for each in (made, anew)]
    assert first_losses[0] < first_losses[1] - 0.2
    with one_worker_killed(tmp_path / "hit" / "checkpoints"):
        trained(grown, tmp_path / "hit", continue_from=str(reference), learning_rate=1e-3, checkpoint_every_s=0)
    assert largest_difference(tmp_path / "calm", tmp_path / "hit") == 0


@pytest.mark.slow
def test_an_adapter_goes_on_when_every_weight_is_partitioned(
    grown: tuple[Path, Path], reference: Path, tmp_path: Path
) -> None:
    options = {"continue_from": str(reference), "learning_rate": 1e-12, "num_workers": 2, "zero_stage": 3}
    trained(grown, tmp_path / "a", **options)
    assert largest_difference(reference, tmp_path / "a") < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("workers", [{}, {"num_workers": 2, "zero_stage": 2}])
def test_compiled_layers_train_the_same_adapter(
    packed: tuple[Path, Path],
    reference: Path,
    tmp_path: Path,
    workers: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A compiled layer that differs would not be used, and the log would say so."""
    trained(packed, tmp_path / "a", torch_compile=True, **workers)
    assert "not compiled" not in caplog.text
    assert largest_difference(reference, tmp_path / "a") < 2e-3
