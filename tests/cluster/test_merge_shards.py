import pytest

from readapt_ray.cluster import merge_shards
from readapt_ray.errors import InputError, ModelError, WeightMismatchError
from readapt_ray.stages.merge import MergeConfig, merge
from readapt_ray.storage import Location
from readapt_ray.weights.export import plan_shards
from readapt_ray.weights.merge_plan import MergeModels, plan_merge
from readapt_ray.weights.merging import Scales
from tests import factories


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    pretrained = factories.tiny_decoder(root / "pre")
    retriever = factories.write_contract(factories.full_retriever(root / "ret", pretrained))
    return {
        "pretrained": pretrained,
        "retriever": retriever,
        "adapter": factories.dora_adapter(root / "ad", pretrained),
    }


def _config(models, output, **options):
    values = {name: str(folder) for name, folder in models.items()}
    return MergeConfig.parse(values | {"output": str(output), "max_shard_bytes": 30_000} | options)


def _content(folder):
    return {
        path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"
    }


def test_tasks_write_the_same_bytes(tmp_path, models, ray_session):
    layers = {"layer_scales": "0=0.8,1=0.2"}
    merge(_config(models, tmp_path / "here", **layers))
    artifact = merge(_config(models, tmp_path / "spread", num_workers=2, **layers))
    assert artifact.manifest.counts["num_shards"] > 3
    here, spread = _content(tmp_path / "here"), _content(tmp_path / "spread")
    assert here == spread
    assert merge(_config(models, tmp_path / "spread", **layers)).manifest == artifact.manifest


def test_an_error_in_a_task_is_ours_and_what_was_written_stays(tmp_path, models, ray_session):
    pretrained = factories.tiny_decoder(tmp_path / "pre")
    tensors = factories.read_tensors(pretrained)
    tensors["model.norm.weight"][0] = float("nan")
    factories.write_tensors(pretrained, tensors)
    config = _config({**models, "pretrained": pretrained}, tmp_path / "out", num_workers=1)
    with pytest.raises(ModelError, match=r"'norm\.weight' of .* holds NaN"):
        merge(config)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("model-*.safetensors")}
    assert written
    with pytest.raises(ModelError, match=r"'norm\.weight' of .* holds NaN"):
        merge(config)
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_node_that_finds_another_model_is_refused(tmp_path, models, ray_session):
    named = MergeModels(
        pretrained=str(models["pretrained"]),
        retriever=str(models["retriever"]),
        adapters=(str(models["adapter"]),),
        bundle=None,
        accept=(),
        encoding=None,
    )
    readapter = plan_merge(named).readapter
    job = merge_shards.ShardJob(
        models=named,
        fingerprints=("0" * 32,) * 3,
        scales=Scales(1.0, (0.5,)),
        plan=plan_shards(readapter, dtype="retriever", max_shard_bytes=30_000),
        target=Location(str(tmp_path / "out")),
        num_threads=1,
    )
    with pytest.raises(WeightMismatchError, match=r"another model under .*pre' than the driver"):
        merge_shards.write_on_cluster(job, num_workers=1, report=lambda done: None)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_factors_are_made_on_one_machine(models, tmp_path):
    with pytest.raises(InputError, match="num_workers spreads the weight files"):
        _config(models, tmp_path / "out", num_workers=2, factors=True)
