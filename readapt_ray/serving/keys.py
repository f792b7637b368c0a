"""Read API keys, find the key of a request, and limit its rate.

In: a YAML or JSON file (or the text of `READAPT_API_KEYS`) of names with their keys. Only the SHA-256 of each key stays
in memory and is sent to other processes. A check costs one hash, and one comparison per key; its time does not depend
on how much of a key is right.
"""

import contextlib
import hashlib
import hmac
import math
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
    """An API key: the name of its owner, its digest, and what it may be used for."""

    name: str
    sha256: str
    """Hexadecimal digest of the key."""
    requests_per_minute: float | None = None
    """Maximum number of requests per minute; None for no limit."""
    domains: frozenset[str] | None = None
    """Names of the domains or versions that it may use; None for all."""
    within: DocFilter | None = None
    """Filter that every search with this key must pass; None for no restriction."""


def read_keys(uri: str | None) -> tuple[ApiKey, ...]:
    """Read the API keys from a file or, if `uri` is None, from `READAPT_API_KEYS`; return () if that is not set.

    Each entry is `name: key`, or
    `name: {key: ..., requests_per_minute: 600, within: {filter: {tenant: acme}}, domains: [legal]}`. A key may be given
    as `sha256:` and its digest. Whether the domains are served is not checked here.

    Raises:
        InputError: the file does not exist or is no such list, a key has under 16 characters, an entry has an unknown
            field or a wrong value, or two entries have the same name or the same key. No message shows a key.
    """
    if uri is None:
        text, where = os.environ.get(ENVIRONMENT, ""), ENVIRONMENT
        if not text.strip():
            return ()
    else:
        location, where = Location(uri), repr(uri)
        if not location.is_file():
            raise InputError(f"api_keys = {uri!r}: no such file; give a YAML file of `name: key`")
    try:  # a parser's message may show a key, so none is shown
        content = text if uri is None else location.read_text()
        entries = yaml.load(content, DistinctLoader)
    except TwiceError as error:
        raise InputError(f"{where}: {error.problem}; keep one of them, and give each key its own name") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise InputError(f"{where} is not YAML in UTF-8; it must hold one `name: key` a line") from None
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{where} holds no keys; it must hold one `name: key` a line")
    keys = tuple(_parse(str(name), entry, where) for name, entry in entries.items())
    _check_distinct(keys, where)
    return keys


def _check_distinct(keys: Sequence[ApiKey], where: str) -> None:
    """Refuse entries with the same key, or with names that are equal as text: restrictions of one would not apply."""
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
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf):
        raise InputError(f"{where}: requests_per_minute of {name!r} is {rate!r}; it must be a finite number over 0")
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
    """Parse the filter of a key; refuse one that restricts nothing, since that is a mistake."""
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
    """Remove READAPT_API_KEYS from the environment during the block, so that Ray's processes do not inherit the keys.

    It is set again after the block. Call `read_keys` before.
    """
    text = os.environ.pop(ENVIRONMENT, None)
    try:
        yield
    finally:
        if text is not None:
            os.environ[ENVIRONMENT] = text


class KeyRing:
    """The API keys of one gateway, with the rate limit of each.

    Args:
        keys: valid keys; without any, every request is anonymous.
        share: share of each key's rate that this process grants: 1 / number of gateways.
        clock: returns a time in seconds that never decreases.
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
        """Find the key in the value of an `Authorization: Bearer ...` header; None if it has no key, or an unknown one.

        ASGI servers decode header bytes as Latin-1, so a key with other characters is UTF-8 read as Latin-1.
        """
        scheme, _, given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given.encode("latin-1").strip()).hexdigest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found if scheme.lower() == "bearer" else None

    def wait_s(self, key: ApiKey) -> float:
        """Count one request; return 0 if it is within the key's rate, else the seconds until one is allowed again.

        A request over the rate is not counted. Up to ten seconds' worth may come at once. A key without a rate gives 0.
        """
        bucket = self._buckets.get(key.name)
        return bucket.take() if bucket else 0.0


class _Bucket:
    """A token bucket that holds as many requests as the rate allows in ten seconds."""

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
