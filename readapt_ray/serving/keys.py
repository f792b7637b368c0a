"""Read and check API keys: who may ask, and how often.

Enters: a YAML or JSON file (or the text of `READAPT_API_KEYS`) of names with their keys; what stays in memory
and goes to other processes is the SHA-256 of each key. A check costs one hash and one comparison a key,
in time that does not depend on how much of a key was right.
"""

import contextlib
import hashlib
import hmac
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from readapt_ray.errors import InputError
from readapt_ray.serving.doc_filter import DocFilter, FilterFields, doc_filter
from readapt_ray.storage import Location
from readapt_ray.yaml_files import DistinctLoader, TwiceError

ENVIRONMENT = "READAPT_API_KEYS"
_HASHED = "sha256:"
_MIN_CHARACTERS = 16
_BURST_S = 10.0


@dataclass(frozen=True)
class ApiKey:
    """The owner of a key, and what may be done with it."""

    name: str
    sha256: str
    """Hexadecimal digest of the key."""
    requests_per_minute: float | None = None
    """Requests a minute at most; None for no limit."""
    domains: frozenset[str] | None = None
    """The domains (or versions) that answer it; None for all."""
    within: DocFilter | None = None
    """What its searches are restricted to; None for nothing."""


def read_keys(uri: str | None) -> tuple[ApiKey, ...]:
    """Read the keys of a file, or of the environment if no file is named; return none if there is neither.

    Each entry is `name: key`, or `name: {key: ..., requests_per_minute: 600, within: {filter: {tenant: acme}}, domains: [legal]}`; a key may be
    given as `sha256:` and its digest.

    Raises:
        InputError: the file is not there, is not such a list, a key is too short to be one, or two entries have one name
            or one key.
    """
    if uri is None:
        text, where = os.environ.get(ENVIRONMENT, ""), ENVIRONMENT
        if not text.strip():
            return ()
    else:
        location, where = Location(uri), repr(uri)
        if not location.is_file():
            raise InputError(f"api_keys = {uri!r}: no such file; give a YAML file of `name: key`")
    try:  # no message of a parser, since it may show a key
        content = text if uri is None else location.read_text()
        entries = yaml.load(content, DistinctLoader)
    except TwiceError as error:
        raise InputError(f"{where}: {error.problem}; keep one of them, and give each key its own name") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"{where} is not YAML in UTF-8; it must hold one `name: key` a line") from None
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{where} holds no keys; it must hold one `name: key` a line")
    keys = tuple(_parse(str(name), entry, where) for name, entry in entries.items())
    _check_distinct(keys, where)
    return keys


def _check_distinct(keys: Sequence[ApiKey], where: str) -> None:
    """Refuse two entries of one key, or of names that are one as text: the restrictions of one would not hold."""
    if twice := [name for name, count in Counter(each.name for each in keys).items() if count > 1]:
        raise InputError(f"{where}: {twice[0]!r} is given twice; give each key its own name")
    owners: dict[str, str] = {}
    for key in keys:
        if (other := owners.setdefault(key.sha256, key.name)) != key.name:
            raise InputError(f"{where}: {other!r} and {key.name!r} have the same key; give each its own key")


def _parse(name: str, entry: Any, where: str) -> ApiKey:
    values = entry if isinstance(entry, dict) else {"key": entry}
    key, rate = values.get("key"), values.get("requests_per_minute")
    unknown = sorted(set(values) - {"key", "requests_per_minute", "within", "domains"})
    if unknown:
        raise InputError(
            f"{where}: {name!r} has {unknown}; a key has `key`, `requests_per_minute`, `within` and `domains`"
        )
    domains = values.get("domains")
    if "domains" in values and not (
        isinstance(domains, list) and domains and all(isinstance(each, str) for each in domains)
    ):
        raise InputError(
            f"{where}: domains of {name!r} is {domains!r}; it must be a list of names, such as [legal, med]"
        )
    allowed = None if domains is None else frozenset(domains)
    within = _within(name, values["within"], where) if "within" in values else None
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or rate <= 0):
        raise InputError(f"{where}: requests_per_minute of {name!r} is {rate!r}; it must be a number over 0")
    # No message shows a key.
    if not isinstance(key, str) or len(key) < _MIN_CHARACTERS:
        raise InputError(
            f"{where}: the key of {name!r} must be text of at least {_MIN_CHARACTERS} characters; quote digits"
        )
    if key.startswith(_HASHED):
        digest = key.removeprefix(_HASHED).lower()
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise InputError(f"{where}: the key of {name!r} begins with {_HASHED} but no SHA-256 follows")
        return ApiKey(name, digest, rate, allowed, within)
    return ApiKey(name, hashlib.sha256(key.encode()).hexdigest(), rate, allowed, within)


def _within(name: str, given: Any, where: str) -> DocFilter:
    """Read the filter of a key. Refuse one that restricts nothing: it was meant to."""
    try:
        found = doc_filter(FilterFields.model_validate(given))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("within", *first["loc"])))
        raise InputError(f"{where}: {place} of {name!r}: {first['msg']}") from None
    if found is None:
        raise InputError(f"{where}: `within` of {name!r} must have `doc_id_prefix`, `doc_ids` or `filter`")
    if found.prefix == "" and found.doc_ids is None and not found.conditions:
        raise InputError(f"{where}: doc_id_prefix of {name!r} is empty, which every doc_id begins with; write a prefix")
    return found


@contextlib.contextmanager
def out_of_environment() -> Iterator[None]:
    """Keep the keys from the processes that this block starts: Ray's need none, and would show them to each other."""
    text = os.environ.pop(ENVIRONMENT, None)
    try:
        yield
    finally:
        if text is not None:
            os.environ[ENVIRONMENT] = text


class KeyRing:
    """Check keys and count requests.

    Args:
        keys: those that are allowed; with none, every request is anonymous.
        share: the part of each key's rate that this process may use, 1 / number of gateways.
        clock: seconds, rising.
    """

    def __init__(
        self, keys: Sequence[ApiKey], *, share: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keys = tuple(keys)
        self._buckets = {
            key.name: _Bucket(key.requests_per_minute / 60 * share, clock) for key in keys if key.requests_per_minute
        }

    def __bool__(self) -> bool:
        """Return whether any key is configured."""
        return bool(self._keys)

    def find(self, authorization: str | None) -> ApiKey | None:
        """Return the owner of the key in an `Authorization: Bearer ...` header; None for no key, or an unknown one.

        The header is as ASGI has it: bytes, of UTF-8 where the key is, each decoded as a character of Latin-1.
        """
        scheme, _, given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given.encode("latin-1").strip()).hexdigest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found if scheme.lower() == "bearer" else None

    def wait_s(self, key: ApiKey) -> float:
        """Count one request; return 0 if it is within the key's rate, else the seconds until the next one is."""
        bucket = self._buckets.get(key.name)
        return bucket.take() if bucket else 0.0


class _Bucket:
    """A token bucket with room for the requests of ten seconds."""

    def __init__(self, per_s: float, clock: Callable[[], float]) -> None:
        self._per_s = per_s
        self._clock = clock
        self._most = max(1.0, per_s * _BURST_S)
        self._left = self._most
        self._at_s = clock()

    def take(self) -> float:
        now_s = self._clock()
        self._left = min(self._most, self._left + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._left >= 1.0:
            self._left -= 1.0
            return 0.0
        return (1.0 - self._left) / self._per_s
