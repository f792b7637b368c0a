"""Run the commands `refresh`, `find` and `clean`, and return what they print."""

from collections.abc import Sequence

from readapt_ray import flags
from readapt_ray.recipes.refreshing import clean, find, refresh
from readapt_ray.recipes.refreshing.options import CleanConfig, FindConfig, RefreshConfig


def output_of(command: str, description: str, arguments: Sequence[str]) -> str:
    """Run `refresh`, `find` or `clean` with its command-line arguments, and return the text to print."""
    if command == "refresh":
        refreshing = flags.parse(command, description, RefreshConfig, arguments)
        return f"generation {refresh.refresh(refreshing).number} of {refreshing.root}"
    if command == "find":
        finding = flags.parse(command, description, FindConfig, arguments)
        return find.as_text(find.find(finding), finding.doc_id, finding.root)
    return clean.clean(flags.parse(command, description, CleanConfig, arguments)).text()
