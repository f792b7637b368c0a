"""Import FAISS in the build that is installed, and train indexes on GPUs where that build can.

Two packages bring the module `faiss`, and only one of them may be installed: faiss-cpu (the extra `cpu`), or faiss-gpu (the
extra `gpu`), which does all that faiss-cpu does.
"""

import contextlib
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import InputError

try:
    import faiss
except ModuleNotFoundError as missing:
    raise InputError(
        "vector indexes need FAISS, which is not installed; pip install 'readapt-ray[cpu]', or on machines with NVIDIA GPUs "
        "pip install 'readapt-ray[gpu]'"
    ) from missing

__all__ = ["faiss", "train"]

_GPU_WORK_BYTES = 256 << 20
"""What k-means takes on a GPU beside its centroids; the default of 1.5 GB is too much for several tasks on one GPU."""


def train(index: Any, vectors: NDArray[np.float32]) -> None:
    """Train an index, with the k-means of its inverted lists on a GPU if there is one and FAISS is built for it.

    At 4,096 dimensions k-means is nearly all of the time. Tasks of one node spread over its GPUs.
    """
    num_gpus = faiss.get_num_gpus()  # 0 in faiss-cpu
    lists: Any = None
    if num_gpus:
        with contextlib.suppress(RuntimeError):  # not an IVF index
            lists = faiss.extract_index_ivf(index)
    if lists is None:
        index.train(vectors)
        return
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_GPU_WORK_BYTES)
    centroids = faiss.IndexFlat(lists.d, lists.metric_type)
    on_gpu = faiss.index_cpu_to_gpu(resources, os.getpid() % num_gpus, centroids)
    lists.clustering_index = on_gpu
    try:
        index.train(vectors)
    finally:
        lists.clustering_index = None
