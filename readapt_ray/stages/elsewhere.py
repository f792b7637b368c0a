"""What names mean on a worker, whose current folder may be another than the driver's."""

from pathlib import Path

from readapt_ray.catalog.models import Model
from readapt_ray.storage import Location


def absolute(location: Location) -> Location:
    """The same place by a name that does not depend on the current folder."""
    return Location(location.path) if location.is_local else location


def model_name(model: Model) -> str:
    """A name by which a worker finds the same model: its folder where the user named one, else what the user called it."""
    named = Path(model.name).expanduser()
    return str(model.folder) if named.is_dir() and named.resolve() == model.folder else model.name
