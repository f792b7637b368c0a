"""Read what machines, GPUs and storage have and cost: a YAML file, ours or the user's."""

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
    """Of one GPU, in units of 10^9 bytes."""


class Machine(Config):
    """A machine type of a cloud."""

    cpus: int
    """Virtual CPUs."""
    memory_gb: float
    """In units of 10^9 bytes."""
    gpu: str = ""
    """Its kind of GPU; a name of the table's `gpus`."""
    gpus: int = 0
    """How many."""
    network_gbit: float = 10.0
    """Gbit/s between nodes over TCP."""
    on_demand: float
    """USD an hour."""
    spot: float
    """USD an hour, usually; spot prices move."""
    on_demand_from: str = ""
    """Where the price is from, and of when: a name of the table's `sources`, or a text."""
    spot_from: str = ""
    """The same for the spot price."""


class Storage(Config):
    """Prices of an object store."""

    usd_per_gb_month: float
    """A gigabyte kept for a month."""
    usd_per_1000_writes: float
    """A thousand PUT, COPY or LIST requests."""
    usd_per_1000_reads: float
    """A thousand GET requests."""


class PriceTable(Config):
    """Machines, GPUs and their prices. `--prices FILE.yaml` replaces it."""

    source: str
    """Where prices are from, and of when, if their machine does not say."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Sources with their dates, by the names that machines give."""
    gpus: dict[str, Device]
    """GPUs by name."""
    machines: dict[str, Machine]
    """Machine types by the cloud's name for them."""
    storage: Storage
    """The object store."""

    def source_of(self, machine_type: str, *, spot: bool) -> str:
        """Return where the price of a machine type is from, and of when."""
        machine = self.machines[machine_type]
        name = machine.spot_from if spot else machine.on_demand_from
        return self.sources.get(name, name) or self.source


def read_prices(uri: str | None) -> PriceTable:
    """Read the price table of a file, or the one that comes with the package.

    Raises:
        InputError: there is no such file, or it is not a price table.
    """
    location = Location(uri or str(PRICES_FILE))
    return PriceTable.parse(read_mapping(location, "a price table"), where=location.uri)


def read_mapping(location: Location, what: str) -> dict[str, Any]:
    """Return the options of a YAML file; of several documents the first that Ray would read, else the first.

    Raises:
        InputError: there is no such file, or it holds no options; `what` says what it should be.
    """
    documents = [each for each in read_yaml(location, what) if isinstance(each, dict)]
    ray = [each for each in documents if str(each.get("kind", "")).startswith("Ray")]
    if not documents:
        raise InputError(f"{location.uri!r} holds no options by name; it must be {what}")
    return dict((ray or documents)[0])
