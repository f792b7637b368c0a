"""What a user installs: the wheel holds all that runs, and nothing of the repository's other folders."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_wheel_holds_the_pair_the_report_template_and_no_tests(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(REPOSITORY)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {
        "readapt_ray/py.typed",
        "readapt_ray/retrieval/report.html",
        "readapt_ray/data/quickstart/pretrained/model.safetensors",
        "readapt_ray/data/quickstart/pretrained/tokenizer.json",
        "readapt_ray/data/quickstart/retriever/adapter_model.safetensors",
        "readapt_ray/data/quickstart/retriever/readapt.json",
    }
    assert wanted <= names
    assert {name.split("/")[0] for name in names} == {"readapt_ray", f"{wheel.name.split('-py3')[0]}.dist-info"}
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "readapt_ray").rglob("*.py")}
    assert modules <= names
