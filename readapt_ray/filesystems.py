"""Turn a path or URI into a pyarrow filesystem and the path in it.

A client of an object store keeps connections and credentials. So each process has one client per store and set of
options. A forked process makes new ones, because connections cannot be shared.
"""

import functools
import os
import re
import urllib.parse

import pyarrow.fs as pafs

from readapt_ray.errors import InputError

_S3_ATTEMPTS = 10
"""With the SDK's exponential backoff, retries last about a minute of 503 answers or lost connections."""
_S3_OPTIONS = ("region", "scheme", "endpoint_override")
_S3_SILENT_S = 120
"""Seconds that a store may send nothing while it copies an object: 5 GiB at 45 MB/s. The SDK's default is 3 s."""
_S3_CONNECT_S = 10
_QUERY = re.compile(r"\?(\w+=[^&?]*(?:&\w+=[^&?]*)*)$")
"""The options at the end of a URI. Any other `?`, and any `#`, is part of a file name."""
_CREDENTIALS = re.compile(r"secret|password|token|signature|access_key|account_key|\bsig\b", re.IGNORECASE)


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of a local path or URI, and the path in it.

    Raises:
        InputError: pyarrow cannot open it.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        return _open_s3(uri) if uri.startswith("s3://") else _open_uri(uri)
    except (ValueError, NotImplementedError, OSError) as error:
        raise InputError(
            f"cannot open {_split(uri)[0]!r}: {error}; give a local path or a URI that pyarrow opens, such as "
            f"s3://bucket/folder"
        ) from error


def listed(filesystem: pafs.FileSystem, folder: pafs.FileSelector) -> list[pafs.FileInfo]:
    """Return the entries of a folder.

    Raises:
        InputError: a name is not UTF-8. pyarrow can neither return nor open such a file.
    """
    found: list[pafs.FileInfo] = filesystem.get_file_info(folder)
    try:
        for each in found:
            _ = each.path
    except UnicodeDecodeError as error:
        raise InputError(f"the name of the file {error.object!r} is not UTF-8; rename it") from error
    return found


def extended(uri: str, tail: str) -> str:
    """Append `tail`, such as "/corpus" or "-blocks", to the path of a local path or URI. Options of a URI stay last."""
    if "://" not in uri:
        return f"{uri.rstrip('/')}{tail}"
    head, query = _split(uri)
    longer = f"{head.rstrip('/')}{tail if uri.startswith('s3://') else urllib.parse.quote(tail)}"
    if query:
        return f"{longer}?{query}"
    return longer if _split(longer) == (longer, "") else f"{longer}?"


def sibling(uri: str, name: str) -> str:
    """Replace the last name in a local path or URI. The options of a URI stay at its end."""
    head, query = _split(uri) if "://" in uri else (uri, "")
    folder, slash, _ = head.rstrip("/").rpartition("/")
    other = f"{folder}{slash}{name}"
    if query:
        return f"{other}?{query}"
    return other if "://" not in uri or _split(other) == (other, "") else f"{other}?"


def check_uri(uri: str) -> None:
    """Refuse a path or URI that is empty, or that contains credentials.

    Raises:
        InputError: it is empty, or contains credentials.
    """
    if not uri:  # "" + "/corpus" would be in the root of the disk
        raise InputError("a path is empty, as one from a variable that is not set; give a folder, a file or a URI")
    refuse_credentials(uri)


def refuse_credentials(uri: str, *, variables: str = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") -> None:
    """Refuse a URI that contains credentials, because they would appear in logs and manifests.

    Args:
        uri: of a file, a folder or a server.
        variables: the environment variables to set instead, for the message.

    Raises:
        InputError: the URI contains credentials.
    """
    if "://" in uri and _holds_credentials(uri):
        raise InputError(
            f"a URI that begins with {uri.partition('://')[0]}:// holds credentials; give it without them, and set them in the "
            f"environment ({variables}) or give the machine a role"
        )


def _open_s3(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of an `s3://` URI and the path in it. It retries for longer than pyarrow's default.

    Raises:
        ValueError: an option behind the `?` is unknown, or there is no bucket.
    """
    head, query = _split(uri)
    path = head.removeprefix("s3://").rstrip("/")
    bucket = path.partition("/")[0]
    options = dict(urllib.parse.parse_qsl(query))
    unknown = sorted(options.keys() - set(_S3_OPTIONS))
    if unknown or not bucket:
        raise ValueError(
            f"unknown options {unknown}, known are {', '.join(_S3_OPTIONS)}" if unknown else "it names no bucket"
        )
    endpoint = options.get("endpoint_override") or _first_of("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    region = options.get("region") or _first_of("AWS_REGION", "AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if endpoint else _region_of(bucket)
    scheme = options.get("scheme") or urllib.parse.urlsplit(endpoint or "").scheme or "https"
    return _s3_client(region, scheme, endpoint, _first_of("AWS_ACCESS_KEY_ID"), os.getpid()), path


def _open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of a URI that is not `s3://`, and the path in it."""
    head, query = _split(uri)
    scheme, _, rest = head.replace("#", "%23").replace("?", "%3F").partition("://")
    host, _, path = rest.partition("/")
    filesystem, base = _client(f"{scheme}://{host}/{'?' if query else ''}{query}", os.getpid())
    below = urllib.parse.unquote(path.strip("/"))
    return filesystem, f"{base.removesuffix('/')}/{below}" if base and below else base or below


@functools.lru_cache
def _client(root: str, pid: int) -> tuple[pafs.FileSystem, str]:
    """Return this process's only client for these options and host, and the path of its root."""
    del pid  # part of the cache key: a forked process gets another client
    filesystem, base = pafs.FileSystem.from_uri(root)
    return filesystem, str(base)


@functools.lru_cache
def _s3_client(region: str, scheme: str, endpoint: str | None, key_id: str | None, pid: int) -> pafs.S3FileSystem:
    """Return this process's only S3 client for these options."""
    del key_id, pid  # part of the cache key: another user of the store or a forked process gets another client
    return pafs.S3FileSystem(
        region=region,
        scheme=scheme,
        endpoint_override=endpoint,
        request_timeout=_S3_SILENT_S,
        connect_timeout=_S3_CONNECT_S,
        allow_delayed_open=True,  # so a small object takes one request
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS),
    )


_region_of = functools.lru_cache(pafs.resolve_s3_region)


def _holds_credentials(uri: str) -> bool:
    head, query = _split(uri)
    scheme, _, rest = head.partition("://")
    authority = rest.partition("/")[0]
    if ":" in authority.rpartition("@")[0] or (scheme == "s3" and ":" in authority and "@" in rest):
        return True  # the second condition finds a secret key that contains a slash
    return any(_CREDENTIALS.search(option.partition("=")[0]) for option in query.split("&"))


def _split(uri: str) -> tuple[str, str]:
    """Split the options off a URI. If the URI ends with `?`, text that looks like options is part of the name."""
    if uri.endswith("?") and _QUERY.search(uri.rstrip("?")):
        return uri[:-1], ""
    found = _QUERY.search(uri)
    return (uri[: found.start()], found[1]) if found else (uri, "")


def _first_of(*variables: str) -> str | None:
    return next((os.environ[name] for name in variables if os.environ.get(name)), None)
