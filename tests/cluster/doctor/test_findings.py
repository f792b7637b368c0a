"""Checks that run side by side: one that hangs or fails is a line, and the others are heard."""

import threading

from readapt_ray.cluster.doctor.findings import Check, Finding, Problem, run_checks
from readapt_ray.cluster.doctor.report import Report
from readapt_ray.errors import StorageError


def broken() -> Finding:
    raise StorageError("cannot write to /x: its disk is mounted read-only; give a folder that can be written")


def test_a_check_that_sleeps_is_a_line_and_not_a_hang() -> None:
    hang = threading.Event()

    def sleeps() -> Finding:
        hang.wait()
        return Finding("never")

    found = run_checks(
        [
            Check("mount", sleeps, "mount it again"),
            Check("root", broken, ""),
            Check("GPUs", lambda: Finding("none"), ""),
        ],
        limit_s=4.0,  # enough for the other two on a busy machine
    )
    assert found["mount"].problems == (Problem("no answer within 4 s; mount it again"),)
    assert "mounted read-only; give a folder" in found["root"].problems[0].text
    assert found["GPUs"] == Finding("none")
    hang.set()


def test_an_error_that_nobody_foresaw_is_a_line() -> None:
    def divide() -> Finding:
        return Finding(str(1 / 0))

    found = run_checks([Check("disk", divide, "")], limit_s=300)
    assert found["disk"].problems[0].text.startswith("ZeroDivisionError: division by zero; fix this")


def test_what_many_machines_have_is_one_line() -> None:
    report = Report()
    for at in range(5):
        report.add(f"10.0.0.{at}", {"models": Finding("0 of 1", (Problem("no model 'x'; give another"),))})
    report.add("10.0.0.1", {"clock": Finding("+3.0 s", (Problem("its clock is ahead; start chrony", fails=False),))})
    report.together["all-reduce"] = Finding("5 workers by gloo, 1.00 GB/s")
    lines = report.text().splitlines()
    assert report.num_failing == 1
    assert lines[0].split() == ["machine", "models", "clock"]
    assert lines[2].split() == ["10.0.0.1", "0", "of", "1", "+3.0", "s"]
    assert lines[6:] == [
        "all-reduce: 5 workers by gloo, 1.00 GB/s",
        "",
        "Will fail:",
        "  10.0.0.0, 10.0.0.1, 10.0.0.2 and 2 more: models: no model 'x'; give another",
        "",
        "Slower than it need be:",
        "  10.0.0.1: clock: its clock is ahead; start chrony",
    ]
