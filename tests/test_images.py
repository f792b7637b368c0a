"""The images' pip lines, run into clean environments: one set of pins, and each image imports what its role needs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PLAIN_PYPI = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_CONSTRAINT": ""}
"""Without what this machine's pip knows: a CPU build of torch, for one."""


def lines(image: str, program: str) -> list[list[str]]:
    """The words of each command of an image that calls a program."""
    text = (REPOSITORY / "clusters" / f"Containerfile.{image}").read_text()
    return [shlex.split(rest) for rest in re.findall(rf"^RUN ({program} .*)$", text, re.MULTILINE)]


def pip(environment: Path, words: list[str], *more: str, **variables: str) -> None:
    """Run a pip line of an image in an environment, from the index that this machine has."""
    if "--index-url" in words:
        at = words.index("--index-url")
        words = words[:at] + words[at + 2 :]
    command = [environment / "bin/python", "-m", *words, "--quiet", *more]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": "", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if "Failed to establish a new connection" in done.stderr or "No matching distribution" in done.stderr:
        pytest.skip(f"no package index that has it: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def extras(image: str) -> set[str]:
    """The extras of the package that an image has."""
    [word] = [word for words in lines(image, "pip") for word in words if word.startswith(".[")]
    return set(word.removeprefix(".[").removesuffix("]").split(","))


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip(tmp_path / "venv", ["pip", "install", "--upgrade", "pip"])
    return tmp_path / "venv"


@pytest.mark.parametrize("image", ["cpu", "gpu"])
def test_both_images_are_built_from_one_set_of_pins(image: str) -> None:
    installs = lines(image, "pip")
    assert len(installs) == 2
    for words in installs:
        assert words[words.index("--constraint") + 1] == "constraints.txt"
        assert not any(re.search("[=<>]", word) for word in words)
    assert image in extras(image)


def test_both_images_run_every_stage() -> None:
    """Where a stage reads PDF files, BM25 scores or an endpoint, its tasks run on nodes of either kind."""
    stages = {"bm25", "datasets", "endpoint", "pdf"}
    assert extras("cpu") == {"cpu", "aws", "google", *stages} and extras("gpu") == {"gpu", "nf4", *stages}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_cpu_image_imports_what_a_head_needs(environment: Path) -> None:
    for words in lines("cpu", "pip"):
        pip(environment, words)
    [[_, flag, code]] = lines("cpu", "python")
    for needed in ("aws.node_provider", "gcp.node_provider", "readapt_ray", "torch", "faiss"):
        assert needed in code
    subprocess.run([environment / "bin/python", flag, code], check=True, cwd="/", env={**os.environ, "PYTHONPATH": ""})


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_gpu_images_packages_resolve_beside_each_other(environment: Path, tmp_path: Path) -> None:
    """Nothing is downloaded but metadata. CUDA 12 of faiss-gpu and CUDA 13 of torch have distributions of other names."""
    report = tmp_path / "report.json"
    [torch, package] = lines("gpu", "pip")
    words = [*torch, *(word for word in package[2:] if word not in torch)]
    pip(environment, words, "--dry-run", f"--report={report}", **PLAIN_PYPI)
    found = {
        each["metadata"]["name"]: each["metadata"]["version"] for each in json.loads(report.read_text())["install"]
    }
    assert "faiss-cpu" not in found
    assert found["faiss-gpu"] == "1.15.1"
    assert found["nvidia-cublas-cu12"].startswith("12.")
    assert found["cuda-toolkit"].startswith("13.")
    assert {"readapt-ray", "ray", "deepspeed", "bitsandbytes", "bm25s", "openai", "pypdf"} <= found.keys()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_faiss_for_gpus_installs_alone_and_imports_without_a_gpu(environment: Path) -> None:
    pip(environment, ["pip", "install", "--constraint", "constraints.txt", "faiss-gpu"])
    code = "import faiss; print(faiss.get_num_gpus(), hasattr(faiss, 'StandardGpuResources'))"
    done = subprocess.run([environment / "bin/python", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "0 True\n"
