"""Parse the URI of a target: a server with a collection, or a folder with a table.

    qdrant://host:6333/COLLECTION?tls=true     scheme, host, port, name, options
    lancedb:s3://bucket/folder/TABLE           scheme, folder, name

A URI with `//` names a server. A URI without `//` names the folder of an embedded database, which runs in the client.
"""

import contextlib
import urllib.parse
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from readapt_ray import filesystems
from readapt_ray.errors import InputError
from readapt_ray.storage import Location


@dataclass(frozen=True)
class Address:
    """The parts of a target's URI."""

    scheme: str
    name: str
    """Name of the collection, table or index; for PostgreSQL, of the database."""
    folder: str = ""
    """Folder of an embedded database; empty for a server."""
    user: str | None = None
    """User before the `@`, as PostgreSQL has it; None if none is given."""
    host: str = ""
    """Host of the server; empty for an embedded database."""
    port: int | None = None
    """Port of the server; None for the default port of the database."""
    options: dict[str, str] = field(default_factory=dict)
    """Options after the `?`, not yet checked; see `check_options`."""

    @property
    def uri(self) -> str:
        """Return the address as a URI. A folder's path is absolute if `parse` made the address, so workers find it."""
        if not self.host:
            return f"{self.scheme}:{self.folder}/{self.name}".rstrip("/")
        user = f"{self.user}@" if self.user else ""
        port = f":{self.port}" if self.port else ""
        options = f"?{urllib.parse.urlencode(self.options)}" if self.options else ""
        return f"{self.scheme}://{user}{self.host}{port}/{urllib.parse.quote(self.name)}{options}"

    def http_url(self, default_port: int) -> str:
        """Return the HTTP URL of the server without a path, such as http://host:6333; https with `?tls=true`.

        Args:
            default_port: port to use if the URI has none.
        """
        return f"http{'s' if self.has_tls else ''}://{self.host}:{self.port or default_port}"

    @property
    def has_tls(self) -> bool:
        """Return whether the connection is encrypted: `?tls=true`. False if the option is missing."""
        return self.options.get("tls", "false") == "true"


def parse(uri: str, *, variables: str) -> Address:
    """Parse the URI of a target into its parts. Scheme and options are not checked, and nothing is connected.

    Args:
        uri: a server (`qdrant://host:6333/COLLECTION`) or a folder (`lancedb:FOLDER/TABLE`).
        variables: names of the environment variables for credentials, for the error message.

    Raises:
        InputError: the URI holds credentials, or names no host, folder or collection.
    """
    scheme, _, rest = uri.partition(":")
    if not rest.startswith("//"):
        filesystems.refuse_credentials(rest)
        folder, _, name = rest.rstrip("/").rpartition("/")
        if not name:
            raise InputError(f"to = {uri!r} names no folder; give {scheme}:FOLDER/NAME")
        return Address(scheme, name, folder=absolute(folder or "."))
    filesystems.refuse_credentials(uri, variables=variables)
    parts = urllib.parse.urlsplit(uri)
    name = urllib.parse.unquote(parts.path.strip("/"))
    try:
        port = parts.port
    except ValueError:
        raise InputError(f"to = {uri!r} has a port that is no number; give {scheme}://HOST:PORT/NAME") from None
    if not parts.hostname or not name or "/" in name:
        raise InputError(f"to = {uri!r} names no host or no collection; give {scheme}://HOST:PORT/NAME")
    return Address(
        scheme,
        name,
        user=parts.username,
        host=parts.hostname,
        port=port,
        options=dict(urllib.parse.parse_qsl(parts.query)),
    )


def absolute(folder: str) -> str:
    """Return the absolute path of a local folder, so that workers find it; return a URI unchanged."""
    return folder if "://" in folder else Location(folder).path


def check_options(address: Address, known: Collection[str]) -> None:
    """Check the options after the `?` of a URI.

    Args:
        address: the parsed URI.
        known: names of the options that the target has. The values of options other than `tls` are not checked.

    Raises:
        InputError: the target does not have such an option, or `tls` is neither true nor false.
    """
    unknown = sorted(address.options.keys() - set(known))
    if unknown:
        raise InputError(
            f"to = {address.uri!r}: unknown options {unknown}; known are {', '.join(sorted(known)) or 'none'}"
        )
    if address.options.get("tls", "false") not in ("true", "false"):
        raise InputError(f"to = {address.uri!r}: tls must be true or false")


@contextlib.contextmanager
def client_of(extra: str) -> Iterator[None]:
    """Turn an ImportError of the block into an error that says which extra to install.

    Args:
        extra: name of the extra of readapt-ray, such as "qdrant".

    Raises:
        InputError: the client is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"an export to {extra} needs its client, which is not installed ({error}); "
            f"pip install 'readapt-ray[{extra}]' on every node"
        ) from None
