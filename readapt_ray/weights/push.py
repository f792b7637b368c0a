"""Upload a model folder to the Hugging Face hub: one commit with weights, tokenizer, encoding and model card.

In: the output of a merge, on any filesystem, and the name of a repository. Out: a log line with the address of the
commit. New repositories are private unless asked otherwise. Files that are there already are not sent again, so a
second push costs only a few requests.
"""

import logging
import re
from pathlib import Path
from typing import Any

from readapt_ray.artifact_files import STAGE_FILES, split_by_owner
from readapt_ray.catalog import models
from readapt_ray.catalog.fetching import Advice, with_retries
from readapt_ray.errors import InputError, ModelError
from readapt_ray.model_file_names import CONTRACT_NAME
from readapt_ray.storage import Location
from readapt_ray.weights.model_card import CARD_NAME, NAME_IN_CARD

logger = logging.getLogger("readapt_ray")

PREFIX = "hub:"
_REPOSITORY = re.compile(r"(?!.*(?:--|\.\.|\.git$))(?=.{3,96}$)\w[\w.-]*(?<![.-])/\w[\w.-]*(?<![.-])", re.ASCII)
"""The form of OWNER/NAME that the hub accepts."""
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_OF_THE_HUB = {".gitattributes", CARD_NAME}
"""Files that the hub may put into a new repository."""
_ADVICE = Advice(
    refused="check the name, and set HF_TOKEN to a token that may write there",
    failed="the model is whole in its folder; run the same command later, which only sends it",
)


def repository(name: str) -> str:
    """Return the OWNER/NAME in `hub:OWNER/NAME`.

    Raises:
        InputError: the name is not of this form.
    """
    repo_id = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or not _REPOSITORY.fullmatch(repo_id):
        raise InputError(
            f"push = {name!r} is no repository of the hub; write {PREFIX}OWNER/NAME, in letters, digits, '-', '_' and '.', of at "
            f"most 96 characters"
        )
    return repo_id


def push(folder: Location, repo_id: str, *, is_public: bool, fingerprint: str) -> None:
    """Upload a model folder to the hub as one commit, and log its address; requests are retried if the hub is busy.

    Args:
        folder: a finished output of merge.
        repo_id: the repository, OWNER/NAME; it is created if it does not exist. Its old weight files that the model no
            longer has are deleted.
        is_public: whether anybody may read a new repository, and whether an existing one may be public; the visibility
            of an existing one is not changed.
        fingerprint: fingerprint of the model, for the commit message.

    Raises:
        ModelError: the hub refuses the upload, or the repository holds files of something else, or it is public and
            `is_public` is False.
        ReadaptError: the hub cannot be reached, or all retries failed.
    """
    local = models.open_model(folder.uri).folder
    card = (folder / CARD_NAME).read_text().replace(NAME_IN_CARD, repo_id)
    address, is_private = with_retries(
        f"the model to {repo_id} on the hub",
        lambda: _commit(local, card, repo_id, is_public=is_public, fingerprint=fingerprint),
        verb="send",
        advice=_ADVICE,
    )
    logger.info("merge: sent to %s (%s)", address, "private" if is_private else "public")


def _commit(local: Path, card: str, repo_id: str, *, is_public: bool, fingerprint: str) -> tuple[str, bool]:
    """Send the commit; return its address, and whether the repository is private."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    api.create_repo(repo_id, private=not is_public, exist_ok=True)
    there = api.model_info(repo_id)
    names = {file.rfilename for file in there.siblings or []}
    if CONTRACT_NAME not in names and names - _OF_THE_HUB:
        raise ModelError(
            f"{PREFIX}{repo_id} holds something that readapt did not write ({min(names - _OF_THE_HUB)}); give another name"
        )
    if not there.private and not is_public:
        raise ModelError(f"{PREFIX}{repo_id} is public; give --public if it may be, or another name")
    files = [path.relative_to(local).as_posix() for path in sorted(local.rglob("*")) if path.is_file()]
    sent: dict[str, Any] = {name: local / name for name in split_by_owner(files, STAGE_FILES["merge"])[0]}
    sent[CARD_NAME] = card.encode()
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in sent.items()]
    stale = [name for name in sorted(names - sent.keys()) if _WEIGHTS.fullmatch(name)]
    operations += [CommitOperationDelete(name) for name in stale]
    message = f"Readapted retriever {fingerprint}"
    return str(api.create_commit(repo_id, operations, commit_message=message).commit_url), bool(there.private)
