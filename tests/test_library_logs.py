import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from readapt_ray import library_logs


@pytest.fixture(autouse=True)
def libraries() -> Iterator[None]:
    """The loggers of libraries, as they were afterwards; other tests leave levels of their own."""
    loggers = {name: logging.getLogger(name) for name in library_logs._LIBRARIES}
    before = {name: (each.handlers[:], each.filters[:], each.propagate, each.level) for name, each in loggers.items()}
    for each in loggers.values():
        each.setLevel(logging.WARNING)
    yield
    for name, each in loggers.items():
        each.handlers, each.filters, each.propagate, level = before[name]
        each.setLevel(level)


def test_what_libraries_log_goes_to_a_file_and_not_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("ray.data", "transformers"):
        logging.getLogger(name).addHandler(logging.StreamHandler(sys.stderr))
    library_logs.silence()
    library_logs.silence()  # a second time changes nothing
    logging.getLogger("DeepSpeed").addHandler(logging.StreamHandler(sys.stdout))  # as when it is imported later
    logging.getLogger("DeepSpeed").propagate = False
    with library_logs.written_to(tmp_path / "log"):
        logging.getLogger("ray.data.exceptions").error("Dataset execution will now abort")
        logging.getLogger("transformers.tokenization").warning("Token indices sequence length is longer")
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
        logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU")
        logging.getLogger("ray.data").setLevel(logging.DEBUG)  # as Ray Data does
        logging.getLogger("ray.data.executor").debug("Operator 0 has 3 tasks")
        logging.getLogger("pypdf._reader").warning("EOF marker not found")
    logging.getLogger("ray.data.exceptions").error("after the block")
    said = capfd.readouterr()
    assert said.out + said.err == ""
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "ray.data.exceptions ERROR Dataset execution will now abort",
        "transformers.tokenization WARNING Token indices sequence length is longer",
        "bitsandbytes.backends.cpu.ops WARNING Failed to load CPU gemm_4bit_forward",
        "DeepSpeed WARNING Setting accelerator to CPU",
        "pypdf._reader WARNING EOF marker not found",
    ]


def test_a_librarys_own_files_stay_as_they_are(tmp_path: Path) -> None:
    own = logging.FileHandler(tmp_path / "ray-data.log")
    logging.getLogger("ray.data").addHandler(own)
    library_logs.silence()
    assert own in logging.getLogger("ray.data").handlers
    own.close()


def test_a_file_whose_folder_is_gone_disturbs_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    library_logs.silence()
    with library_logs.written_to(tmp_path / "gone" / "log"):
        logging.getLogger("ray.data").error("nobody reads this")
    assert capfd.readouterr().err == ""
