"""The main job on three Ray nodes while workers, raylets, nodes, drivers and the whole cluster are killed and the disk fills.

    python benchmarks/chaos.py --seeds 40 --work DIR

Each seed draws one to three such events and their moments (tests/chaos/harness.py). After each the same command is
submitted again, if its driver ended, until it succeeds; then what it left is compared with an undisturbed run: every file,
the passages that bore loss, vectors, index. Every tenth seed runs all steps; the others take the steps before that of the
first event from the undisturbed run, and end with the step of the last event, whose output is what the next ones would
start from. Seeds that --output records are not run again, so it may be run in pieces (--minutes). The nodes are processes
on one machine; the root is on a small tmpfs where mounting is permitted.
"""

import argparse
import datetime
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from readapt_ray import hardware

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import small_disk
from tests.chaos import harness
from tests.chaos.harness import Harness

_DISK_BYTES = 48 << 20
_WHOLE_EVERY = 10


def main() -> None:
    """Run the seeds that are not recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=30, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--minutes", type=float, default=600, help="begin no seed after this time")
    parser.add_argument("--work", type=Path, required=True, help="folder for roots, logs and the undisturbed run")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/chaos.json"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    until_s = time.monotonic() + 60 * options.minutes
    recorded: dict[str, Any] = json.loads(options.output.read_text())["seeds"] if options.output.is_file() else {}
    with small_disk.mounted(options.work / "disk", _DISK_BYTES) as can_fill:
        runner = Harness(options.work)
        try:
            calm = known(options.work / "calm.json", lambda: undisturbed(runner))
            for seed in range(options.first, options.first + options.seeds):
                if str(seed) not in recorded and time.monotonic() < until_s:
                    record = json.dumps(disturbed(runner, seed, calm, can_fill=can_fill))
                    recorded[str(seed)] = json.loads(record.replace(str(options.work), "DIR"))
                    write(options.output, recorded, calm)
        finally:
            runner.close()


def known(file: Path, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an earlier piece found; else what is found now. Of other code it could only make seeds differ that do not."""
    if not file.is_file():
        file.write_text(json.dumps(find()))
    return dict(json.loads(file.read_text()))


def undisturbed(runner: Harness) -> dict[str, Any]:
    """The run without events: how long each step took."""
    outcome = runner.run([], {}, seed=0)
    assert runner.trained_as_wanted(outcome.num_steps)
    assert outcome.submissions == 1, outcome
    runner.keep_calm()
    print(f"undisturbed: {outcome.seconds} s, {outcome.durations_s()}", flush=True)
    return {"seconds": outcome.seconds, "duration_s": outcome.durations_s()}


def disturbed(runner: Harness, seed: int, calm: dict[str, Any], *, can_fill: bool) -> dict[str, Any]:
    """One seed's run, and how it compares."""
    events = harness.drawn(seed, can_fill=can_fill)
    record: dict[str, Any]
    try:
        outcome = runner.run(events, calm["duration_s"], seed, whole=seed % _WHOLE_EVERY == 9 or not events)
        record = {
            "events": outcome.events,
            "num_steps": outcome.num_steps,
            "submissions": outcome.submissions,
            "messages": outcome.messages,
            "seconds": outcome.seconds,
            "same_passages_trained_on": runner.trained_as_wanted(outcome.num_steps),
            "files_that_differ": runner.files_that_differ(outcome.num_steps),
        }
    except AssertionError as error:
        record = {"events": [asdict(event) for event in events], "failure": str(error)}
    print(f"seed {seed}: {json.dumps(record)}", flush=True)
    return record


def is_good(record: dict[str, Any]) -> bool:
    """Whether a seed's run left what the undisturbed one did."""
    return (
        "failure" not in record and record["same_passages_trained_on"] is not False and not record["files_that_differ"]
    )


def write(output: Path, recorded: dict[str, Any], calm: dict[str, Any]) -> None:
    """Keep what is known so far."""
    events = Counter(event["kind"] for each in recorded.values() for event in each["events"])
    result = {
        "command": f"python benchmarks/chaos.py --seeds {len(recorded)} --work DIR",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info()["driver"],
        "versions": {name: version(name) for name in ("ray", "torch", "deepspeed")},
        "undisturbed_s": calm["seconds"],
        "num_seeds": len(recorded),
        "num_seeds_with_the_undisturbed_result": sum(map(is_good, recorded.values())),
        "num_events": dict(sorted(events.items())),
        "seeds": dict(sorted(recorded.items(), key=lambda pair: int(pair[0]))),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
