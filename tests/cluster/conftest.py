import pytest

from readapt_ray.catalog.models import open_model
from readapt_ray.cluster import on_worker
from readapt_ray.cluster.embed_job import EmbedJob
from readapt_ray.retrieval.query_encoder import describe_encoder
from readapt_ray.storage import Location
from tests import factories


@pytest.fixture
def job(tmp_path, monkeypatch):
    """What tasks of embed know: 40 passages, of which two have the same text."""
    monkeypatch.setattr(on_worker, "this_node", lambda: "")
    monkeypatch.setattr(on_worker, "check_node", lambda: None)
    passages = factories.small_corpus(40)
    passages[6] = passages[3]._replace(doc_id="twin")
    factories.ingest_artifact(tmp_path / "corpus", passages, num_files=1)
    folder = factories.tiny_encoder(tmp_path / "model", headless=True)
    factories.write_contract(folder)
    model = open_model(str(folder))
    encoding = model.encoding.model_copy(update={"max_passage_tokens": 29})
    return EmbedJob(
        model_name=str(folder),
        base_name=on_worker.base_name(model),
        tokenizer=model.tokenizer_fingerprint,
        encoder=describe_encoder(model, encoding, "float32"),
        encoding=encoding,
        dtype="float32",
        vector_dtype="float32",
        batch_tokens=None,
        passages=Location(str(tmp_path / "corpus/passages")),
        output=Location(str(tmp_path / "out")),
    )
