"""Do the work of `readapt encoding`: show how a model encodes text, or write it into its folder as readapt.json."""

import json
import logging

from readapt_ray.catalog import models
from readapt_ray.errors import InputError
from readapt_ray.model_file_names import CONTRACT_NAME
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")


def show_contract(name: str, *, write: bool) -> str:
    """Return the encoding of a model as the text of a readapt.json: from its files or the catalog, else a guess.

    A log line says where it is from; a guess is logged as a warning.

    Args:
        name: a catalog name, a folder, a GGUF file, a URI or a hub id. No weights are fetched; a GGUF file is
            converted.
        write: also write readapt.json into the model's folder, unless it has one.

    Raises:
        ModelError: there is no such model, or no encoding can express what its files say.
        InputError: `write` is True, but the model is neither a local folder nor a URI.
    """
    model = models.open_model(name, with_weights=False)
    found = models.find_encoding(model)
    encoding, source = found or (models.likely_encoding(model), "")
    if found:
        logger.info("%s: as %s says", name, source)
    else:
        logger.warning(
            "%s: nothing says it; this is a guess from its architecture and tokenizer: compare it with the model card",
            name,
        )
    text = json.dumps({"encoding": encoding.model_dump(mode="json")}, indent=2, ensure_ascii=False)
    if write and source != CONTRACT_NAME:
        target = _folder(name) / CONTRACT_NAME
        target.write_text(text + "\n")
        logger.info("written to %s", target)
    return text


def _folder(name: str) -> Location:
    folder = models.own_folder(name)
    if (folder is None and "://" not in name) or (folder is not None and folder.is_file()):
        raise InputError(
            f"--write: {name!r} is neither a folder here nor a URI; save what is shown without --write in a file, and give "
            f"that to the other commands as --encoding FILE.json"
        )
    return Location(name if folder is None else str(folder))
