"""An index per domain: each is searched by its own domain alone, and one that is lost takes none with it."""

import asyncio
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import numpy as np
import pytest

from readapt_ray.artifacts import open_artifact
from readapt_ray.catalog.models import open_model
from readapt_ray.errors import ArtifactMissingError, FingerprintMismatchError, InputError
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.vector_index import VectorIndex
from readapt_ray.serving import domain_app
from readapt_ray.serving.domains import DomainBackend, DomainIndex
from readapt_ray.serving.index_slice import IndexSlice
from readapt_ray.serving.keys import read_keys
from readapt_ray.serving.options import ServeConfig
from readapt_ray.serving.server import serve, stop
from readapt_ray.serving.versions import Found, Ranked, merge_ranked
from readapt_ray.weights.domain_sources import read_domains
from tests import factories
from tests.chaos.nodes import free_port
from tests.serving.browser import chromium
from tests.serving.conftest import index_artifact, local_server, serving_at
from tests.serving.test_domains import NAMES, SharedInProcess, write_domains


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, a retriever and three domains as factors; two have a corpus of their own with an index, the third has none."""
    folder = tmp_path_factory.mktemp("indexes")
    list(write_domains(folder))
    for seed, name in enumerate(NAMES[:2]):
        encoder = Encoder.load(open_model(str(folder / name)))
        passages = [each._replace(doc_id=f"{name}-{each.doc_id}") for each in factories.small_corpus(40, seed=seed)]
        factories.ingest_artifact(folder / f"corpus-{name}", passages)
        index_artifact(folder / f"index-{name}", encoder, name, passages)
        if name == "legal":
            retriever = Encoder.load(open_model(str(folder / "retriever")))
            index_artifact(folder / "index-before", retriever, "retriever", passages)
    return folder


class Searcher:
    """The index of a domain, in this process; a test can break it and ask how often it was searched."""

    def __init__(self, folder, name, index=None):
        index = VectorIndex.open(str(folder / f"index-{index or name}"))
        self.corpus = open_artifact(str(folder / f"corpus-{name}"), "ingest")
        files = (self.corpus.location / "passages").files(".parquet")
        self.slices = [IndexSlice(index.folder, [each], files, index.words) for each in index.records]
        self.described = DomainIndex(
            app=name,
            fingerprint=f"{name}+index",
            encoder_fingerprint=index.encoder["fingerprint"],
            slices={f"index-{number}": each.num_vectors for number, each in enumerate(self.slices)},
            has_words=bool(index.words),
            is_split=False,
            corpus=self.corpus.uri,
            corpus_fingerprint=self.corpus.fingerprint,
        )
        self.num_searches = 0

    def _ranked(self, hits, number):
        return [[Ranked(doc.doc_id, doc.score) for doc in hits.of_query(query, "")] for query in range(number)]

    async def search(self, vectors, top_k, wanted):
        self.num_searches += 1
        parts = [self._ranked(each.search(vectors, top_k, wanted), len(vectors)) for each in self.slices]
        return Found(merge_ranked(parts, len(vectors), top_k), [])

    async def search_words(self, texts, top_k, wanted):
        self.num_searches += 1
        parts = [self._ranked([*each.search_words(texts, top_k, wanted)][-1], len(texts)) for each in self.slices]
        return Found(merge_ranked(parts, len(texts), top_k), [])


def with_before(folder, shared, searchers):
    """The domains, and the first of them once more at scale 0, with the index of the retriever's own vectors."""
    made = backends(folder, shared, searchers)
    searcher, source = Searcher(folder, "legal", "before"), made["legal"].source
    at_0 = replace(source, name="legal-before", scales=(0.0,) * len(source.scales))
    return made | {"legal-before": DomainBackend(shared, at_0, searcher.described, searcher)}


def backends(folder, shared, searchers):
    made = {}
    for each in read_domains({name: str(folder / name) for name in NAMES}):
        searcher = searchers.get(each.source.name)
        made[each.source.name] = DomainBackend(shared, each.source, searcher and searcher.described, searcher)
    return made


async def ask(client, **body):
    answer = await client.post("/v1/search", json=body)
    return answer.status_code, answer.json()


def found_ids(body):
    return [hit["doc_id"] for hit in body["data"][0]["hits"]] if "data" in body else body


def best_of(folder, name, query, top_k, model=None):
    """The doc_ids that the merged model finds, or another one, by numpy."""
    encoder = Encoder.load(open_model(str(folder / (model or name))))
    passages = factories.small_corpus(40, seed=NAMES.index(name))
    vectors = encoder.encode([each.text for each in passages], "passage", [each.title for each in passages])
    scores = vectors @ encoder.encode([query], "query")[0]
    return [f"{name}-{passages[place].doc_id}" for place in np.argsort(-scores, kind="stable")[:top_k]]


def test_a_domain_searches_its_own_index_with_the_merged_models_ranking(folder):
    async def run():
        shared = SharedInProcess(folder)
        searchers = {name: Searcher(folder, name) for name in NAMES[:2]}
        async with local_server(backends(folder, shared, searchers)) as local, local.client() as client:
            for name in NAMES[:2]:
                query = factories.small_corpus(40, seed=NAMES.index(name))[7].text
                status, body = await ask(client, model=name, query=query, top_k=5)
                assert status == 200 and found_ids(body) == best_of(folder, name, query, 5)
                assert body["data"][0]["hits"][0]["text"] and body["fingerprint"] == f"{name}+index"
                status, body = await ask(client, model=name, query=query, top_k=3, mode="bm25")
                assert status == 200 and found_ids(body)[0] == f"{name}-d00007"
                made = (
                    await client.post("/v1/embeddings", json={"model": name, "input": query, "truncate": True})
                ).json()
                vector = {"vector": made["data"][0]["embedding"], "fingerprint": made["fingerprint"], "top_k": 5}
                assert found_ids((await ask(client, **vector))[1]) == best_of(folder, name, query, 5)
                assert (await ask(client, model="tax", **vector))[0] == 400
            status, body = await ask(client, model="tax", query="x")
            assert status == 404 and body["error"]["code"] == "no_index"
            listed = {each["id"]: each for each in (await client.get("/v1/models")).json()["data"]}
            assert [listed[name]["num_vectors"] for name in NAMES] == [40, 40, 0]
            merged_encoder = Encoder.load(open_model(str(folder / "legal"))).fingerprint
            assert listed["legal"]["encoder_fingerprint"] == merged_encoder

    asyncio.run(run())


def test_a_key_of_one_domain_cannot_search_anothers_index(folder, tmp_path):
    keys = tmp_path / "keys.yaml"
    keys.write_text("acme: {key: secret-of-acme-1234, domains: [legal]}\n")

    async def run():
        searchers = {name: Searcher(folder, name) for name in NAMES[:2]}
        made = backends(folder, SharedInProcess(folder), searchers)
        default_med = {name: made[name] for name in ("med", "legal", "tax")}
        stolen = made["med"].info
        vector = {"vector": [0.1] * stolen.dimension}
        attacks = [
            {"model": "med", "query": "x"},
            {"model": "med-passage", "query": "x"},
            {"model": "med-raw", "query": "x"},
            {"model": " med", "query": "x"},
            {"model": "MED", "query": "x"},
            {"model": "default", "query": "x"},
            {"query": "x"},
            {"query": "x", "user": "somebody"},
            {"query": ["x", "y"], "mode": "bm25"},
            {"model": "med", "query": "x", "mode": "hybrid"},
            {"model": "domains", "query": "x"},
            {"model": "", "query": "x"},
            {**vector, "fingerprint": stolen.encoder_fingerprint},
            {**vector, "fingerprint": stolen.fingerprint},
            {**vector, "fingerprint": stolen.encoder_fingerprint, "model": "legal"},
            {**vector, "fingerprint": stolen.encoder_fingerprint, "model": "med"},
            {"model": "legal", "query": "x", "knowledge_scale": 0.1},
            {"model": "legal", "query": "x", "index": "med"},
        ]
        asked_by = {"authorization": "Bearer secret-of-acme-1234"}
        async with (
            local_server(default_med, keys=read_keys(str(keys))) as local,
            local.client(headers=asked_by) as client,
        ):
            for attack in attacks:
                status, body = await ask(client, **attack)
                assert status in (400, 404, 422), (attack, status)
                assert "med-d" not in json.dumps(body), attack
            med_ids = [f"med-d{number:05d}" for number in range(40)]
            for more in ({"doc_ids": med_ids}, {"doc_id_prefix": "med-"}, {"top_k": 1000}):
                status, body = await ask(client, model="legal", query="x", **more)
                assert status == 200 and not any(each.startswith("med-") for each in found_ids(body))
        assert searchers["med"].num_searches == 0 and searchers["legal"].num_searches == 3

    asyncio.run(run())


def test_one_server_answers_before_and_after(folder, tmp_path):
    keys = tmp_path / "keys.yaml"
    keys.write_text("all: secret-of-all-12345\nacme: {key: secret-of-acme-1234, domains: [legal]}\n")
    query = factories.small_corpus(40, seed=0)[7].text[:9]
    after, before = (best_of(folder, "legal", query, 10, model) for model in ("legal", "retriever"))
    assert after != before

    async def run():
        searchers = {name: Searcher(folder, name) for name in NAMES[:2]}
        made = with_before(folder, SharedInProcess(folder), searchers)
        async with local_server(made, knowledge_scale="0..1", keys=read_keys(str(keys))) as local:
            async with local.client(headers={"authorization": "Bearer secret-of-all-12345"}) as client:
                asked = {"model": "legal", "query": query}
                for scale, name, expected in ((0, "legal-before", before), (0.5, "legal", after)):
                    status, body = await ask(client, **asked, knowledge_scale=scale)
                    assert status == 200 and found_ids(body) == expected and body["model"] == name
                    assert found_ids((await ask(client, model=name, query=query))[1]) == expected
                    given = {"model": "legal", "input": query, "knowledge_scale": scale}
                    embedded = (await client.post("/v1/embeddings", json=given)).json()
                    vector = {"vector": embedded["data"][0]["embedding"], "fingerprint": embedded["fingerprint"]}
                    assert found_ids((await ask(client, **vector))[1]) == expected
                    status, body = await ask(client, **vector, knowledge_scale=scale)
                    assert status == 400 and "'knowledge_scale' needs 'query'" in body["error"]["message"]
                for scale, status, message in (
                    (0.25, 404, "no index of 'legal' has vectors at 'knowledge_scale' 0.25"),
                    (1.5, 400, "may be from 0 to 1"),
                    ("0", 400, "must be a finite number"),
                ):
                    found, body = await ask(client, **asked, knowledge_scale=scale)
                    assert found == status and message in body["error"]["message"]
                assert (await ask(client, model="med", query=query, knowledge_scale=0))[0] == 404
                listed = {each["id"]: each for each in (await client.get("/v1/models")).json()["data"]}
                assert [listed[name]["knowledge_scales"] for name in ("legal", "legal-before")] == [[0.5], [0.0]]
                merged_by, made_by = (Encoder.load(open_model(str(folder / each))) for each in ("legal", "retriever"))
                assert listed["legal"]["encoder_fingerprint"] == merged_by.fingerprint
                assert listed["legal-before"]["encoder_fingerprint"] == made_by.fingerprint
            async with local.client(headers={"authorization": "Bearer secret-of-acme-1234"}) as client:
                assert (await ask(client, **asked))[0] == 200
                assert (await ask(client, **asked, knowledge_scale=0))[0] == 404

    asyncio.run(run())


def test_the_page_shows_before_and_after_of_a_domain(folder, tmp_path):
    searchers = {name: Searcher(folder, name) for name in NAMES[:2]}
    made = with_before(folder, SharedInProcess(folder), searchers)
    chosen = {name: made[name] for name in ("legal", "legal-before", "tax")}
    with serving_at(chosen) as url, chromium(tmp_path) as page:
        page.call("Page.navigate", url=f"{url}/?q=lock")
        page.wait_for("document.querySelectorAll('#columns section').length === 2")
        offered = page.value("[...document.querySelectorAll('#left option')].map(each => each.textContent)")
        assert offered == ["legal (knowledge scale 0.5)", "legal-before (knowledge scale 0)"]
        names = page.value("[...document.querySelectorAll('#columns h2')].map(each => each.textContent)")
        assert names == ["legal-before", "legal"]
        for side, model in enumerate(("retriever", "legal")):
            docs = page.value(
                f"[...document.querySelectorAll('#columns section')[{side}].querySelectorAll('.doc')].map(each => each.textContent)"
            )
            assert docs == best_of(folder, "legal", "lock", 10, model)


def test_an_index_fits_a_scale_or_is_refused(folder):
    def checked(**more):
        domain = {"factors": str(folder / "legal"), **more}
        config = ServeConfig.parse({"base": str(folder / "base"), "domains": {"legal": domain}})
        records = domain_app.domain_records(config)
        domain_app.check_indexes(config, records)
        return records[0].source

    after, before = str(folder / "index-legal"), str(folder / "index-before")
    assert checked(index=before, knowledge_scale=0).scales == (0.0,)
    assert checked(index=after, knowledge_scale=0.5) == checked(index=after)
    with pytest.raises(FingerprintMismatchError, match=f"--retriever {folder / 'retriever'}"):
        checked(index=after, knowledge_scale=0)
    with pytest.raises(FingerprintMismatchError, match=f"--domain {folder / 'legal'}"):
        checked(index=before)
    with pytest.raises(FingerprintMismatchError, match=r"no model makes those of knowledge_scale 0\.25"):
        checked(index=after, knowledge_scale=0.25)
    assert checked(knowledge_scale=0.25).scales == (0.25,)
    with pytest.raises(InputError, match="knowledge_scale"):
        checked(knowledge_scale=float("nan"))


def test_a_lost_corpus_or_index_leaves_the_other_domains_alone(folder, tmp_path):
    async def run():
        shared = SharedInProcess(folder)
        searchers = {name: Searcher(folder, name) for name in NAMES[:2]}
        lost = searchers["med"].described
        searchers["med"].described = DomainIndex(**{**vars(lost), "corpus": str(tmp_path / "gone")})
        async with local_server(backends(folder, shared, searchers)) as local, local.client() as client:
            answers = await asyncio.gather(*(ask(client, model=name, query="x") for name in ("legal", "med") * 10))
            assert {status for status, _ in answers[::2]} == {200}
            assert {status for status, _ in answers[1::2]} == {503}
            embedded = await client.post("/v1/embeddings", json={"model": "tax", "input": "x"})
            assert embedded.status_code == 200

    asyncio.run(run())


def test_an_index_of_another_encoder_is_not_taken(folder):
    shared, searchers = SharedInProcess(folder), {"legal": Searcher(folder, "med")}
    with pytest.raises(FingerprintMismatchError, match="domain 'legal' has the vectors of another encoder"):
        backends(folder, shared, searchers)


def _domains(folder, **indexes):
    domains = {name: {"factors": str(folder / name)} for name in NAMES}
    for name, index in indexes.items():
        domains[name] |= {"index": str(folder / index), "corpus": str(folder / f"corpus-{name}")}
    return {"base": str(folder / "base"), "domains": domains, "port": free_port()}


def test_a_server_does_not_start_with_indexes_that_do_not_fit(folder, tmp_path):
    fits = _domains(folder, legal="index-legal", med="index-med")

    def refused(kind, message, **changes):
        with pytest.raises(kind, match=message):
            serve(ServeConfig.parse(fits | changes), blocking=False)

    swapped = _domains(folder, legal="index-med")["domains"]
    refused(
        FingerprintMismatchError,
        r"index of domain 'legal' .* has the vectors of another model .*--domain",
        domains=swapped,
    )
    refused(FingerprintMismatchError, "another encoding or dtype", dtype="bfloat16")
    refused(ArtifactMissingError, "index-gone", domains=_domains(folder, med="index-gone")["domains"])
    keys = tmp_path / "keys.yaml"
    keys.write_text("acme: {key: secret-of-acme-1234, within: {filter: {tenant: acme}}}\n")
    refused(InputError, "'acme' cannot search in version 'legal'", api_keys=str(keys))


@pytest.mark.slow
def test_domains_are_searched_on_ray_and_one_whose_index_is_lost_fails_alone(ray_session, folder, tmp_path):
    import ray

    shutil.copytree(folder / "index-med", tmp_path / "index-med")
    given = _domains(folder, legal="index-legal") | {"timeout_s": 20}
    given["domains"]["med"] |= {"index": str(tmp_path / "index-med"), "corpus": str(folder / "corpus-med")}
    given["domains"]["before"] = given["domains"]["legal"] | {
        "index": str(folder / "index-before"),
        "knowledge_scale": 0,
    }
    given |= {"num_cpus_per_replica": 0.1, "num_cpus_per_index_actor": 0.1, "knowledge_scale": "0..1"}
    url = serve(ServeConfig.parse(given), blocking=False)
    try:
        with httpx.Client(base_url=url, timeout=60) as client:

            def search(name, **more):
                answer = client.post("/v1/search", json={"model": name, "query": "x", "top_k": 3, **more})
                return answer.status_code, answer.json()

            status, body = search("legal", knowledge_scale=0)
            assert status == 200 and found_ids(body) == best_of(folder, "legal", "x", 3, "retriever")
            for name in NAMES[:2]:
                status, body = search(name)
                assert status == 200 and found_ids(body) == best_of(folder, name, "x", 3)
            shutil.rmtree(tmp_path / "index-med")
            applications = [each for each in ray.serve.status().applications if each.startswith("readapt-index-med-")]
            replicas = [
                each["name"]
                for each in ray.util.list_named_actors(all_namespaces=True)
                if applications[0] in each["name"]
            ]
            for each in replicas:
                ray.kill(ray.get_actor(each, "serve"))
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(search, ("legal", "med") * 20))
            assert {status for status, _ in answers[::2]} == {200}
            assert {status for status, _ in answers[1::2]} == {503}
            second = given | _domains(folder, legal="index-legal", med="index-med") | {"port": given["port"]}
            serve(ServeConfig.parse(second | {"update": True}), blocking=False)
            assert [search(name)[0] for name in NAMES] == [200, 200, 404]
    finally:
        stop()
