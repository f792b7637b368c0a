"""What differs on a worker: its current folder, and so what names mean; and how many cores are its own."""

import os
from pathlib import Path
from typing import Any

from readapt_ray.catalog.models import Model
from readapt_ray.storage import Location


def absolute(location: Location) -> Location:
    """The same place by a name that does not depend on the current folder."""
    return Location(location.path) if location.is_local else location


def model_name(model: Model) -> str:
    """A name by which a worker finds the same model: its folder where the user named one, else what the user called it."""
    named = Path(model.name).expanduser()
    return str(model.folder) if named.is_dir() and named.resolve() == model.folder else model.name


def faiss_on_one_thread() -> Any:
    """FAISS for a task of one CPU. Its own BLAS takes all cores, and waits for them busily, unless told before it is loaded."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import faiss

    faiss.omp_set_num_threads(1)
    return faiss
