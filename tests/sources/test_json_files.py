"""Lines of JSON Lines files of judgements have the limits that the options give."""

import json
from pathlib import Path

import pytest

from readapt_ray.sources.json_files import json_rows
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow
from readapt_ray.storage import Location


@pytest.mark.parametrize(("options", "is_bad"), [(ReadOptions(max_text_bytes=10), True), (ReadOptions(), False)])
def test_a_line_over_the_limit_of_the_options_is_a_bad_row(tmp_path: Path, options: ReadOptions, is_bad: bool) -> None:
    rows = [{"id": "a", "text": "short"}, {"id": "b", "text": "x" * (options.max_line_bytes if is_bad else 1_200_000)}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = Location(str(tmp_path / "q.jsonl"))
    found = list(json_rows(file, "q.jsonl", lambda keys: ["id"], options, is_lines=True))
    assert found[0] == ("q.jsonl:1", ("a",))
    assert isinstance(found[1], BadRow) == is_bad
