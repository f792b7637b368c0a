"""Format the report of `readapt doctor`: a table with a row per machine, then a line per problem."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from readapt_ray.cluster.doctor.findings import Finding, Problem

_COLUMNS = ("versions", "packages", "GPUs", "shared memory", "disk", "root", "models", "clock", "checks")
_ALL = "all machines"
_NAMED = 3
"""Most machines that a line names; further ones are only counted."""


@dataclass
class Report:
    """Findings by machine and check."""

    rows: dict[str, dict[str, Finding]] = field(default_factory=dict)
    together: dict[str, Finding] = field(default_factory=dict)
    """Findings about all machines together, such as an all-reduce, by name of the check."""

    def add(self, machine: str, found: Mapping[str, Finding]) -> None:
        """Add the findings of a machine, by column; a later finding replaces an earlier one of the same column."""
        self.rows.setdefault(machine, {}).update(found)

    @property
    def num_failing(self) -> int:
        """Count the problems that will make work fail; the same problem on several machines counts once."""
        return sum(problem.fails for _, problem in self._machines())

    def text(self) -> str:
        """Format the table with a row per machine, the findings about all machines, and a line per problem."""
        lines = [self._table(), *(f"{name}: {finding.shown}" for name, finding in self.together.items())]
        for title, fails in (("Will fail:", True), ("Slower than it need be:", False)):
            found = [(where, problem.text) for (where, problem) in self._lines() if problem.fails is fails]
            lines += ["", title, *(f"  {where}: {text}" for where, text in found)] * bool(found)
        return "\n".join(lines)

    def _table(self) -> str:
        shown = [name for name in _COLUMNS if any(name in row for row in self.rows.values())]
        lines = [("machine", *shown)]
        for machine, row in self.rows.items():
            lines.append((machine, *(row[name].shown if name in row else "" for name in shown)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def _machines(self) -> dict[tuple[str, Problem], list[str]]:
        """Return the machines that have each problem, by check and problem."""
        found: dict[tuple[str, Problem], list[str]] = {}
        for machine, row in [*self.rows.items(), (_ALL, self.together)]:
            for name, finding in row.items():
                for problem in finding.problems:
                    found.setdefault((name, problem), []).append(machine)
        return found

    def _lines(self) -> list[tuple[str, Problem]]:
        lines = []
        for (name, problem), machines in self._machines().items():
            others = len(machines) - _NAMED
            where = ", ".join(machines[:_NAMED]) + (f" and {others} more" if others > 0 else "")
            lines.append((f"{where}: {name}", problem))
        return lines
