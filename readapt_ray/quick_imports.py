"""Import large libraries in less time: without Python's garbage collector.

What opening a model imports (torch, transformers and what they bring) leaves some 700,000 objects behind. The collector
looks through them again and again while they come, and finds nothing: a sixth of 4.5 s of a core.
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Pause the garbage collector while the block imports. Load no weights in it: what they leave is freed late."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def import_for_models(*, freeze: bool = False) -> None:
    """Import what every model of transformers needs, before the first one is opened.

    Args:
        freeze: exempt what is there from all later collections. For processes that do nothing but work with a model:
            elsewhere, garbage that somebody else has left would stay for ever.
    """
    with quick_imports():
        import torch  # noqa: F401
        from transformers import AutoModel, AutoTokenizer, PreTrainedModel  # noqa: F401

        if freeze:
            gc.freeze()
