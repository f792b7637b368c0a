"""Import large libraries faster by pausing Python's garbage collector.

Importing torch, transformers and their dependencies creates some 700,000 objects. The collector scans them again and
again during the imports and frees nothing: this takes a sixth of 4.5 s on one core.
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Pause the garbage collector inside the `with` block, for imports. Do not load weights in it: garbage is freed late."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def import_for_models(*, freeze: bool = False) -> None:
    """Import torch and transformers with the garbage collector paused, before the first model is opened.

    Args:
        freeze: exempt all present objects from later garbage collections. Use it only in processes that do nothing but
            work with a model: in others, present garbage would never be freed.
    """
    with quick_imports():
        import torch  # noqa: F401
        from transformers import AutoModel, AutoTokenizer, PreTrainedModel  # noqa: F401

        if freeze:
            gc.freeze()
