"""Runs the main job on nodes with networks of their own, and cuts one off while it trains and one while it embeds.

python -m tests.chaos.cut_off FOLDER, in a network namespace that is thrown away; prints JSON.
"""

import json
import subprocess
import sys
from pathlib import Path

from tests.chaos import harness
from tests.chaos.harness import Event, Harness
from tests.chaos.network import network

EVENTS = [
    Event(place=harness.STEPS.index(step), share=0.6, kind="cut-off") for step in ("adapter", "vectors/retriever")
]


def main(folder: Path) -> None:
    """Undisturbed, then cut off; what differs."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with network() as made:
        if made is None:
            print(json.dumps({"permitted": False}))
            return
        runner = Harness(folder, made)
        try:
            duration_s = runner.run([], {}, seed=0).durations_s()
            runner.keep_calm()
            outcome = runner.run(EVENTS, duration_s, seed=1)
            found = {
                "permitted": True,
                "events": outcome.events,
                "submissions": outcome.submissions,
                "messages": outcome.messages,
                "same_passages_trained_on": runner.trained_as_wanted(outcome.num_steps),
                "files_that_differ": runner.files_that_differ(outcome.num_steps),
            }
            print(json.dumps(found))
        finally:
            runner.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
