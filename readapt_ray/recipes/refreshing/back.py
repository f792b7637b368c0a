"""Go back to an earlier generation: make it the present one again, and export it to the vector database again."""

import logging
import time
from dataclasses import replace

from readapt_ray import artifacts, generations, leases
from readapt_ray.errors import InputError
from readapt_ray.generations import CORPUS, EXPORT, FOLDER_NAME, STAGE_OF, VECTORS, Generation
from readapt_ray.recipes.chain import make
from readapt_ray.recipes.refreshing.collection import changed_by_others
from readapt_ray.recipes.refreshing.lock import next_number, publish
from readapt_ray.recipes.refreshing.options import RULES
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")


def go_back(number: int, root: Location, there: list[Generation], lock: leases.Lease) -> Generation:
    """Make an earlier generation the present one again, as a new entry that shares its artifacts.

    If the present generation has an export, the vector database is changed back too.

    Args:
        number: number of the earlier generation. The new entry gets the next free number.
        root: the root of the generations.
        there: its generations, oldest first.
        lock: the lock of the root, from `locked`.

    Raises:
        InputError: there is no such generation, its artifacts were removed, or others changed the vector database.
    """
    started_s = time.monotonic()
    earlier, present = generations.as_of(root, number), there[-1]
    if earlier.number == present.number:
        raise InputError(f"back = {number}: generation {number} is the present one; give an earlier one")
    for name, folder in earlier.artifacts.items():
        artifacts.open_artifact((root / folder).uri, STAGE_OF[name])
    made = {name: folder for name, folder in earlier.artifacts.items() if name != EXPORT}
    new, settings = next_number(root, there), earlier.settings
    if EXPORT in present.artifacts:
        if changed := changed_by_others(root, present, new):
            raise InputError(f"{changed}; run `readapt refresh --root {root.uri} --overwrite` first, then go back")
        settings = {**settings, **{name: present.settings[name] for name in ("to", "export")}}
        made[EXPORT] = f"{FOLDER_NAME}/{new:05d}/{EXPORT}"
        options = {**present.settings["export"], "to": present.settings["to"]}
        corpus = {"corpus": earlier.folder(root, CORPUS)} if options.get("with_text", True) else {}
        make(
            "export",
            options,
            RULES,
            vectors=earlier.folder(root, VECTORS),
            previous=present.folder(root, EXPORT),
            output=(root / made[EXPORT]).uri,
            **corpus,
        )
    entry = replace(
        earlier,
        number=new,
        what=f"back to {number}",
        created=generations.now(),
        seconds=round(time.monotonic() - started_s, 3),
        settings=settings,
        artifacts=made,
        counts={},
        signals={},
        advice="",
    )
    logger.info("refresh: generation %d is generation %d again", new, number)
    return publish(root, there, entry, lock)
