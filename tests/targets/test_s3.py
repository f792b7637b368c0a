"""Files and LanceDB on a real S3 endpoint on loopback."""

from pathlib import Path

import pytest

from readapt_ray.stages.export import ExportConfig, export
from readapt_ray.targets import opening
from tests import object_store
from tests.targets import worlds


@pytest.mark.slow
@pytest.mark.parametrize("to", ["files:s3://bucket/files", "lancedb:s3://bucket/lance/passages"])
def test_an_export_to_an_object_store_is_updated_there(tmp_path: Path, to: str) -> None:
    rows = worlds.passages(20)
    worlds.write(tmp_path / "old", rows)
    del rows[worlds.doc_id(3)]
    rows[worlds.doc_id(4)]["text"] = "changed"
    worlds.write(tmp_path / "new", rows)
    previous = None
    with object_store.running():
        for name in ("old", "new"):
            inputs = {each: str(tmp_path / name / each) for each in ("vectors", "corpus")}
            made = export(ExportConfig(**inputs, to=to, previous=previous, output=f"s3://bucket/{to[:5]}-{name}"))
            previous = made.uri
        assert made.manifest.counts == {"num_vectors": 19, "num_sent": 1, "num_deleted": 1}
        assert made.manifest.details["check"]["lowest"] == 1.0
        with opening.open_target(opening.parse(to)) as target:
            assert target.count() == 19
