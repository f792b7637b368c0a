"""What a user installs: the wheel holds all that runs, and nothing of the repository's other folders."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_wheel_holds_all_of_the_package_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(REPOSITORY)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"readapt_ray", f"{wheel.name.split('-py3')[0]}.dist-info"}
    files = (
        path
        for path in (REPOSITORY / "readapt_ray").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md")
    )
    assert {str(path.relative_to(REPOSITORY)) for path in files} <= names
