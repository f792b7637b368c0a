"""`ray up`, `exec`, `submit`, `dashboard`, `down` over SSH, and the quickstart's job by `ray job submit`.

The hosts are namespaces on this machine, and Docker is left out; the commands that start Ray, the token, the files that are
mounted and the variables of the image are those of aws.yaml and Containerfile.cpu.
"""

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from readapt_ray import artifacts
from tests import hosts, object_store, quickstart_job
from tests.chaos import nodes
from tests.hosts import SHARED, USER, Hosts, wait_until

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SAME = (
    "upscaling_speed",
    "idle_timeout_minutes",
    "file_mounts",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


def of_the_image() -> dict[str, str]:
    """The variables that the image sets for all its processes, and where the package lies."""
    last = (REPOSITORY / "clusters" / "Containerfile.cpu").read_text().split("\nENV ")[1].splitlines()[0]
    variables = dict(pair.split("=", 1) for pair in last.split())
    return {
        **variables,
        "PATH": f"{BIN}:/usr/bin:/bin:/usr/sbin",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }


@dataclass(frozen=True)
class Launcher:
    """Ray's command line on the machine of whoever starts the cluster, and the cluster's file."""

    file: Path
    environment: dict[str, str]

    def ray(self, *arguments: str) -> str:
        done = subprocess.run(
            [BIN / "ray", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        return done.stdout

    @contextlib.contextmanager
    def dashboard(self) -> Iterator[str]:
        """The address of the job server, through SSH."""
        port = nodes.free_port()
        command = [BIN / "ray", "dashboard", self.file, f"--port={port}"]
        tunnel = subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            nodes.wait_for(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            tunnel.terminate()
            tunnel.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[Hosts, Launcher]]:
    hosts.require()
    home = tmp_path / "me"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray/auth_token").write_text(secrets.token_hex(32))
    (home / ".ray/auth_token").chmod(0o600)
    with hosts.running(tmp_path, 2, of_the_image()) as running:
        aws = yaml.safe_load((REPOSITORY / "clusters" / "aws.yaml").read_text())
        head, *workers = [node.address for node in running.nodes]
        config = {
            **{name: aws[name] for name in SAME},
            "cluster_name": f"readapt-{os.getpid()}",
            "max_workers": len(workers),
            "provider": {"type": "local", "head_ip": head, "worker_ips": workers},
            "auth": {"ssh_user": USER, "ssh_private_key": str(running.key)},
        }
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(config))
        environment = {
            **os.environ,
            "HOME": str(home),
            "PATH": f"{BIN}{os.pathsep}{hosts.PATH}",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(tmp_path / "state"),
            "RAY_UP_enable_autoscaler_v2": "0",  # v2 of Ray 2.60 never starts the workers of this provider
        }
        yield running, Launcher(tmp_path / "cluster.yaml", environment)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_launched_cluster_runs_the_quickstarts_job_on_s3(cluster: tuple[Hosts, Launcher], tmp_path: Path) -> None:
    running, launcher = cluster
    file = str(launcher.file)
    said = launcher.ray("up", file, "--yes", "--no-config-cache")
    assert "Ray runtime started" in said, said
    wait_until(
        lambda: "2 local.cluster.node" in launcher.ray("exec", file, "ray status"), "the worker to join", limit_s=180
    )
    for node in running.nodes:
        assert node.run("stat", "--format=%a", f"{hosts.HOME}/.ray/auth_token") == "600\n"
    listening = running.nodes[0].run("ss", "--listening", "--tcp", "--numeric", "--no-header")
    assert re.findall(r"\S+:8265 ", listening) == ["127.0.0.1:8265 "], listening

    (tmp_path / "seen.py").write_text("import ray; ray.init('auto'); print('nodes:', len(ray.nodes()))\n")
    assert "nodes: 2" in launcher.ray("submit", file, str(tmp_path / "seen.py"))

    quickstart_job.write(running.shared)
    with object_store.running(running.gateway), launcher.dashboard() as address:
        assert "seen.py" in launcher.ray("job", "list", "--address", address)
        other = Launcher(launcher.file, {**launcher.environment, "RAY_AUTH_TOKEN": "0" * 64})
        assert "oken authentication is enabled" in other.ray("job", "list", "--address", address)
        names = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_EC2_METADATA_DISABLED", *object_store.KEYS)
        # The head's start command, as aws.yaml has it, says that GPU nodes may be asked for; these nodes have no GPUs.
        variables = {"READAPT_NUM_NODES": "2", "READAPT_NUM_GPUS": "", **{name: os.environ[name] for name in names}}
        root = f"s3://{object_store.BUCKET}/run"
        said = launcher.ray(
            *("job", "submit", "--address", address, "--working-dir", str(REPOSITORY), "--no-wait"),
            *("--submission-id", "quickstart", "--runtime-env-json", json.dumps({"env_vars": variables})),
            *("--", "python", "jobs/pipeline.py", "--config", f"{SHARED}/quickstart.yaml", "--root", root),
        )
        assert "submitted successfully" in said, said
        logs = ended(launcher, address, "quickstart")
        assert "'quickstart' succeeded" in launcher.ray("job", "status", "--address", address, "quickstart"), logs
        counts = artifacts.open_artifact(f"{root}/vectors/adapted", "embed").manifest.counts
        assert (
            counts["num_vectors"] == artifacts.open_artifact(f"{root}/corpus", "ingest").manifest.counts["num_passages"]
        )

    said = launcher.ray("down", file, "--yes")
    assert "No nodes remaining" in said, said
    assert "raylet" not in running.nodes[0].run("ps", "-A")


def ended(launcher: Launcher, address: str, name: str) -> str:
    """Wait for a job to end, and return its log."""
    deadline_s = time.monotonic() + 900
    while time.monotonic() < deadline_s:
        if re.search("succeeded|failed|was stopped", launcher.ray("job", "status", "--address", address, name)):
            break
        time.sleep(5)
    return launcher.ray("job", "logs", "--address", address, name)
