"""`ray up clusters/aws.yaml` on a made-up AWS (moto's EC2): what it starts, what it runs there, and what the head starts.

The machines do not exist, so ssh and rsync are stand-ins that answer like a machine with Docker and write down what they
were asked. The head's autoscaler is a real one: a Ray head on this machine with the file that `ray up` made for it.
"""

import contextlib
import functools
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import yaml
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models import EC2Backend
from moto.ec2.responses.instances import InstanceResponse

from tests import object_store
from tests.chaos import nodes
from tests.hosts import wait_until
from tests.object_store import Store

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
AWS = yaml.safe_load((REPOSITORY / "clusters" / "aws.yaml").read_text().replace("ACCOUNT", "123456789012"))
TYPES = AWS["available_node_types"]
_SSH = """#!/bin/bash
case "$*" in
  *.Config.Env*) echo '["HOME=/home/readapt"]' ;;
  *"command -v docker || echo"*) echo /usr/bin/docker ;;
  *"printenv HOME"*) echo /home/readapt ;;
  *meminfo*) echo 'MemAvailable: 64000000 kB' ;;
esac
printf '%s\\0' "$*" >> {said}
"""
_RSYNC = """#!/bin/bash
for last; do source="$before"; before="$last"; done
case "$last" in *ray_bootstrap_config.yaml) cp "$source" {folder}/bootstrap.yaml ;; esac
case "$last" in *ray_bootstrap_key.pem) cp "$source" {folder}/ray_bootstrap_key.pem ;; esac
"""


@dataclass
class Cloud:
    """Moto's EC2, and the machine from which `ray up` is called."""

    store: Store
    folder: Path
    environment: dict[str, str]

    def instances(self) -> list[dict[str, Any]]:
        """Every machine that was started."""
        found = self._ec2.describe_instances()["Reservations"]
        return [instance for each in found for instance in each["Instances"]]

    def volume(self, instance: dict[str, Any]) -> dict[str, Any]:
        """The disk of a machine."""
        [device] = instance["BlockDeviceMappings"]
        [volume] = self._ec2.describe_volumes(VolumeIds=[device["Ebs"]["VolumeId"]])["Volumes"]
        return dict(volume)

    def commands(self) -> list[str]:
        """What was asked of the machines over SSH, in order."""
        return (self.folder / "said").read_text().split("\0")

    @functools.cached_property
    def _ec2(self) -> Any:
        """Made once: it takes a second of the process whose threads are the server."""
        return boto3.client("ec2", endpoint_url=self.store.endpoint, region_name="us-east-1")


def kind_of(instance: dict[str, Any]) -> str:
    return next(tag["Value"] for tag in instance["Tags"] if tag["Key"] == "ray-user-node-type")


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    plain = InstanceResponse.run_instances

    def as_many_as_it_may(self: InstanceResponse) -> Any:
        self.params["MinCount"] = self.params["MaxCount"]  # like AWS with room; moto starts the fewest
        return plain(self)

    monkeypatch.setattr(InstanceResponse, "run_instances", as_many_as_it_may)
    for name in (".ssh", ".ray", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / ".ray/auth_token").write_text("0" * 64)
    (tmp_path / "aws.yaml").write_text(yaml.safe_dump(AWS))
    for name, body in (("ssh", _SSH), ("rsync", _RSYNC)):
        tool = tmp_path / "bin" / name
        tool.write_text(body.format(said=tmp_path / "said", folder=tmp_path))
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    with object_store.running() as store:
        urllib.request.urlopen(f"{store.endpoint}/moto-api/reset", data=b"").close()  # moto's state is the process's
        iam = boto3.client("iam", endpoint_url=store.endpoint, region_name="us-east-1")
        for name in ("readapt-head", "readapt-worker"):
            iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
            iam.create_instance_profile(InstanceProfileName=name)
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        changes = {
            "HOME": str(tmp_path),
            "RAY_TMPDIR": str(tmp_path),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
        }
        path = f"{tmp_path / 'bin'}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"
        yield Cloud(store, tmp_path, {**os.environ, **changes, "PATH": path, "AWS_DEFAULT_REGION": "us-east-1"})


def up(cloud: Cloud) -> str:
    done = subprocess.run(
        [BIN / "ray", "up", cloud.folder / "aws.yaml", "--yes", "--no-config-cache"],
        env=cloud.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@contextlib.contextmanager
def head(cloud: Cloud) -> Iterator[str]:
    """The head with its autoscaler, started as `ray up` asked for it; its address."""
    [instance] = cloud.instances()
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path may have some 100 characters
    port = nodes.free_port()
    token = "/home/readapt/.ray/auth_token"
    config = yaml.safe_load((cloud.folder / "bootstrap.yaml").read_text())
    assert config["file_mounts"] == {token: token}  # the head hands its own on
    (cloud.folder / "bootstrap.yaml").write_text(
        yaml.safe_dump({**config, "file_mounts": {token: str(cloud.folder / ".ray/auth_token")}})
    )
    command = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--node-ip-address=127.0.0.1",
        "--num-cpus=0",
    ]
    command += ["--include-dashboard=false", f"--temp-dir={folder}", f"--object-store-memory={100 << 20}"]
    command += [f"--autoscaling-config={cloud.folder / 'bootstrap.yaml'}"]
    started = {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": instance["InstanceId"],
        "RAY_NODE_TYPE_NAME": "head",
    }
    with (cloud.folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env={**cloud.environment, **started}, stdout=log, stderr=subprocess.STDOUT)
    try:
        nodes.wait_for(port)
        yield f"127.0.0.1:{port}"
    finally:
        nodes.kill([*nodes.family(process), psutil.Process(process.pid)])
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def check(cloud: Cloud, instance: dict[str, Any]) -> None:
    """A machine is what its group in the file says."""
    wanted = TYPES[kind_of(instance)]["node_config"]
    assert instance["InstanceType"] == wanted["InstanceType"]
    if "IamInstanceProfile" in instance:  # moto gives it to the first machine of a request alone
        assert instance["IamInstanceProfile"]["Arn"].endswith(f"/{wanted['IamInstanceProfile']['Name']}")
    assert ("InstanceMarketOptions" in wanted) == (instance.get("InstanceLifecycle") == "spot")
    disk = wanted["BlockDeviceMappings"][0]["Ebs"]
    volume = cloud.volume(instance)
    assert (volume["Size"], volume["VolumeType"], volume["Encrypted"]) == (disk["VolumeSize"], "gp3", True)
    assert {"Key": "ray-cluster-name", "Value": "readapt"} in instance["Tags"]


@contextlib.contextmanager
def asking_for_gpus(cloud: Cloud, address: str, *, wait_s: int) -> Iterator["subprocess.Popen[str]"]:
    """A driver that asks for the nodes of a stage on eight GPUs, and waits for them."""
    stage = (
        "import ray\n"
        "from readapt_ray.cluster import autoscaling\n"
        "ray.init()\n"
        "with autoscaling.requested(8, {'CPU': 1.0, 'GPU': 1.0}, least=8): pass\n"
    )
    asked = {
        "RAY_ADDRESS": address,
        "READAPT_NUM_GPUS": "8",
        "READAPT_WAIT_S": str(wait_s),
        "PYTHONPATH": str(REPOSITORY),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", stage], env={**cloud.environment, **asked}, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_launcher_and_the_heads_autoscaler_start_what_the_file_says(cloud: Cloud) -> None:
    up(cloud)
    [first] = cloud.instances()
    assert kind_of(first) == "head"
    check(cloud, first)
    order = ["docker.io", "ecr-login", "docker pull", "docker run", "ray start --head"]
    said = "\n".join(cloud.commands())
    assert sorted(order, key=said.index) == order
    assert "--shm-size='" in said
    assert "pip install" not in said  # what Ray's defaults would set up
    assert "RAY_AUTH_MODE=token READAPT_NUM_GPUS=8 ray start --head --port=6379 --dashboard-host=127.0.0.1" in said

    (cloud.folder / "said").write_text("")
    with head(cloud) as address, asking_for_gpus(cloud, address, wait_s=900):
        wait_until(lambda: len(cloud.instances()) == 11, "ten workers", limit_s=400)
        workers = [each for each in cloud.instances() if each["InstanceId"] != first["InstanceId"]]
        assert sorted(map(kind_of, workers)) == ["cpu"] * 2 + ["gpu"] * 8
        assert {kind_of(each) for each in workers if "IamInstanceProfile" in each} == {"cpu", "gpu"}
        for worker in workers:
            check(cloud, worker)
        worker_address = next(each["PrivateIpAddress"] for each in workers if kind_of(each) == "gpu")
        wait_until(
            lambda: any(worker_address in each and "ray start" in each for each in cloud.commands()),
            "it to start Ray",
            limit_s=200,
        )
        said = "\n".join(each for each in cloud.commands() if worker_address in each)
    order = ["nvidia-smi", "ecr-login", "/opt/dlami/nvme/cache", "docker pull", "docker run", "ray start --address"]
    assert sorted(order, key=said.index) == order
    assert "-v /opt/dlami/nvme/cache:/home/readapt/.cache" in said and "--gpus all" in said


QUOTA = "You have requested more vCPU capacity than your current vCPU limit of 0 allows for the instance bucket"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_quota_that_is_too_small_is_told_to_the_run_that_waits(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = EC2Backend.run_instances

    def within_quota(self: Any, *args: Any, **options: Any) -> Any:
        if options.get("instance_type") == "p5.4xlarge":
            raise EC2ClientError("VcpuLimitExceeded", QUOTA)
        return plain(self, *args, **options)

    monkeypatch.setattr(EC2Backend, "run_instances", within_quota)
    up(cloud)
    with head(cloud) as address:
        wait_until(lambda: len(cloud.instances()) == 3, "the nodes without GPUs", limit_s=400)
        with asking_for_gpus(cloud, address, wait_s=60) as process:
            _, errors = process.communicate(timeout=300)
    said = errors.strip().splitlines()[-1]
    assert "PlacementError: 8 GPUs are needed and the autoscaler brought 0 within 60 s" in said, errors
    assert "the launcher could not start gpu (" in said and "VcpuLimitExceeded" in said
    assert "ask AWS for the quota of its family" in said
