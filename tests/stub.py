"""The text of `readapt_ray/__init__.pyi`: `python -m tests.stub` prints it, `make stub` writes it."""

import inspect
import textwrap

import readapt_ray as ra
from readapt_ray.python.signatures import written

_HEAD = '''"""Public names, for editors and type checkers, which run no code. Made by `make stub` from the configs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload
'''


def text() -> str:
    """The stub: the names of other modules, and each function with its options and docstring."""
    homes = sorted((home, name) for name, home in ra._HOMES.items() if name not in ra._FROM_CONFIGS)
    imports = [f"from readapt_ray.{home} import {name} as {name}" for home, name in homes]
    functions = [_function(name) for name in sorted(ra._FROM_CONFIGS)]
    names = "".join(f'    "{name}",\n' for name in ra.__all__)
    return "\n".join([_HEAD, *imports, "", f"__all__ = [\n{names}]", "__version__: str", *functions, ""])


def _function(name: str) -> str:
    function = getattr(ra, name)
    (config,) = (each for each in ra._HOMES if each.lower() == f"{name}config")
    parameters, returns = written(inspect.signature(function))
    options = "".join(f"    {each},\n" for each in ("*", *parameters))
    docstring = textwrap.indent(f'"""{inspect.getdoc(function)}\n"""', "    ")
    return (
        f"\n@overload\ndef {name}(\n{options}) -> {returns}:\n{docstring}\n"
        f"@overload\ndef {name}(config: {config}, /) -> {returns}: ..."
    )


if __name__ == "__main__":
    print(text(), end="")
