"""Read the table of machine types, GPUs and prices from a YAML file: the package's or the user's."""

from pathlib import Path
from typing import Any, Final

from pydantic import Field

from readapt_ray.config import Config
from readapt_ray.errors import InputError
from readapt_ray.storage import Location
from readapt_ray.yaml_files import read_yaml

PRICES_FILE: Final = Path(__file__).parent.parent / "data" / "prices.yaml"


class Device(Config):
    """A GPU and its peak rates, from its maker's data sheet."""

    tflops: float
    """Dense bfloat16 (float16 before Ampere) TFLOP/s."""
    memory_gb: float
    """Memory of one GPU in 10^9 bytes."""


class Machine(Config):
    """A machine type of a cloud."""

    cpus: int
    """Virtual CPUs."""
    memory_gb: float
    """Memory in 10^9 bytes."""
    gpu: str = ""
    """Kind of GPU: a name of the table's `gpus`."""
    gpus: int = 0
    """Number of GPUs."""
    network_gbit: float = 10.0
    """Gbit/s between nodes over TCP."""
    on_demand: float
    """Price in USD per hour."""
    spot: float
    """Usual spot price in USD per hour; spot prices change."""
    on_demand_from: str = ""
    """Source and date of the price: a name of the table's `sources`, or a text."""
    spot_from: str = ""
    """The same for the spot price."""


class Storage(Config):
    """Prices of an object store."""

    usd_per_gb_month: float
    """Price of storing a gigabyte for a month."""


class PriceTable(Config):
    """Machines, GPUs and their prices. `--prices FILE.yaml` replaces the package's table as a whole."""

    source: str
    """Source and date of prices whose machine does not name one."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Sources with dates, by the names that machines use for them."""
    gpus: dict[str, Device]
    """GPUs by name."""
    machines: dict[str, Machine]
    """Machine types by the cloud's names."""
    storage: Storage
    """Prices of the object store."""

    def source_of(self, machine_type: str, *, spot: bool) -> str:
        """Return the source and date of a machine type's price; the table's `source` if the machine names none.

        Args:
            machine_type: a name in `machines`; others raise KeyError.
            spot: the spot price, not the price on demand.
        """
        machine = self.machines[machine_type]
        name = machine.spot_from if spot else machine.on_demand_from
        return self.sources.get(name, name) or self.source


def read_prices(uri: str | None) -> PriceTable:
    """Read a price table.

    Args:
        uri: path or URI of a YAML file; None for the table of this package.

    Raises:
        InputError: there is no such file, or it is not a price table.
    """
    location = Location(uri or str(PRICES_FILE))
    return PriceTable.parse(read_mapping(location, "a price table"), where=location.uri)


def read_mapping(location: Location, what: str) -> dict[str, Any]:
    """Read the options of a YAML file: a dict by name, not yet checked.

    If it has several documents, read the first one whose `kind` begins with Ray, else the first. Documents that are not
    options by name (lists, texts) are ignored.

    Args:
        location: the file.
        what: what the file should be, for error messages.

    Raises:
        InputError: there is no such file, or it holds no options.
    """
    documents = [each for each in read_yaml(location, what) if isinstance(each, dict)]
    ray = [each for each in documents if str(each.get("kind", "")).startswith("Ray")]
    if not documents:
        raise InputError(f"{location.uri!r} holds no options by name; it must be {what}")
    return dict((ray or documents)[0])
