"""Update a running server to a new generation, by running `readapt serve --update` in another process."""

import logging
import subprocess
import sys
from typing import Any

from readapt_ray.errors import InputError, ReadaptError
from readapt_ray.filesystems import last_part
from readapt_ray.flags import read_options
from readapt_ray.generations import Generation
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_SET_HERE = ("versions", "retriever", "index", "corpus", "root", "as_of", "update")


def server_options(file: str) -> dict[str, Any]:
    """Read the options of a server from a YAML file.

    Raises:
        InputError: the file does not exist, or sets an option that the refresh sets itself.
    """
    options = read_options(file)
    if twice := sorted(options.keys() & set(_SET_HERE)):
        raise InputError(f"{file!r} sets {', '.join(twice)}, which the refresh itself sets; remove it from the file")
    return options


def update_server(file: str, root: Location, generation: Generation) -> None:
    """Update a running server to a generation. It answers from the old one until the new one is ready.

    This process may already be connected to another Ray, for the refresh. So a new process joins the server's Ray.

    Args:
        file: YAML file with the server's options.
        root: the root of the generations.
        generation: the generation to serve. Its number is appended to the name of the version.

    Raises:
        ReadaptError: the server could not be updated. The generation is published nevertheless.
    """
    options = server_options(file)
    model = last_part(str(generation.settings["retriever"]))
    name = f"{options.get('name') or model}-{generation.number}"
    given = ["--config", file, "--update", "--root", root.uri, "--as-of", str(generation.number), "--name", name]
    command = [sys.executable, "-m", "readapt_ray.cli", "serve", *given]
    if subprocess.run(command, check=False).returncode != 0:
        raise ReadaptError(
            f"generation {generation.number} is in place, and the server was not updated to it (see above); fix that, and run "
            f"the same command again"
        )
    logger.info("refresh: the server answers from generation %d", generation.number)
