"""A key whose searches are restricted: one index, many tenants. Its requests try to see more."""

import asyncio
import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.errors import InputError
from readapt_ray.retrieval.vector_index import VectorIndex
from readapt_ray.serving.app import check_keys
from readapt_ray.serving.index_slice import IndexSlice
from readapt_ray.serving.keys import read_keys
from readapt_ray.serving.options import ServeConfig
from readapt_ray.serving.versions import Routing
from readapt_ray.storage import Location
from tests.factories import small_corpus
from tests.serving.conftest import LocalVersion, World, local_server

SEARCH = "/v1/search"
IDS = [each.doc_id for each in small_corpus(40)]
ACME = {doc_id for number, doc_id in enumerate(IDS) if number % 4 == 0}
KEYS = {
    "acme": {"key": "a-key-of-the-tenant-acme", "within": {"filter": {"tenant": "acme"}}},
    "both": {"key": "a-key-of-two-conditions", "within": {"doc_ids": IDS[:8], "filter": {"tenant": "acme"}}},
    "none": {"key": "a-key-of-a-tenant-without-passages", "within": {"filter": {"tenant": "nobody"}}},
    "all": "a-key-without-restrictions",
}
DUE = {"acme": ACME, "both": ACME & set(IDS[:8]), "none": set(), "all": set(IDS)}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text(json.dumps(KEYS))
    return read_keys(str(file))


@pytest.fixture(scope="module")
def tenants(world: World, tmp_path_factory) -> LocalVersion:
    """Of four tenants in turn; the last two passages belong to nobody."""
    file = tmp_path_factory.mktemp("tenants") / "passages.parquet"
    owners = [["acme", "b", "c", "d"][number % 4] if number < 38 else None for number in range(40)]
    pq.write_table(pa.table({"doc_id": IDS, "tenant": owners, "year": list(range(2000, 2040))}), file)
    index = VectorIndex.open(world.version()["index"])
    slices = {each.name: IndexSlice(index.folder, [each], [Location(str(file))], index.words) for each in index.records}
    return dataclasses.replace(LocalVersion.load(world), slices=slices)


def asked(versions, keys, requests, **options):
    """The answers to (name of a key, body)."""

    async def run():
        async with local_server(versions, keys=keys, **options) as server, server.client() as client:
            answers = []
            for name, body in requests:
                secret = KEYS[name] if name == "all" else KEYS[name]["key"]
                content = body if isinstance(body, str) else json.dumps({"query": "array", "top_k": 1000} | body)
                headers = {"authorization": f"Bearer {secret}", "content-type": "application/json"}
                answers.append(await client.post(SEARCH, content=content, headers=headers))
            await asyncio.gather(*server.service.side_searches.tasks)
            return answers

    return asyncio.run(run())


def found(answer) -> set[str]:
    assert answer.status_code == 200, answer.text
    return {hit["doc_id"] for each in answer.json()["data"] for hit in each["hits"]}


def test_each_key_finds_its_own(tenants, keys):
    answers = asked({"tiny": tenants}, keys, [(name, {}) for name in KEYS])
    assert dict(zip(KEYS, map(found, answers), strict=True)) == DUE


OTHERS = [doc_id for doc_id in IDS if doc_id not in ACME]
ATTACKS = [
    {"doc_ids": OTHERS},
    {"doc_ids": IDS},
    {"doc_id_prefix": ""},
    {"doc_id_prefix": "d"},
    {"filter": {"tenant": "b"}},
    {"filter": {"tenant": ["acme", "b"]}},
    {"filter": {"tenant": {"gte": ""}}},
    {"filter": {"year": {"gte": 0}}},
    {"filter": {"year": {"gte": 0}}, "doc_ids": OTHERS},
    {"query": ["array", "lock a thread", "tenant:b"]},
    {"model": "other"},
    {"model": "tiny-passage"},
    {"user": "b"},
    {"with_text": False},
    {"mode": "bm25"},
    {"mode": "hybrid"},
    {"mode": "hybrid", "doc_ids": OTHERS},
    {"mode": "bm25", "query": ["array", "lock", "thread", ""]},
    {"within": None},
    {"within": {"filter": {}}},
    {"filter": {}},
    {"filter": None},
    {"filter": []},
    {"filter": {"tenant": None}},
    {"filter": {"tenant": []}},
    {"filter": {"tenant": {}}},
    {"filter": {"tenant": {"gte": None}}},
    {"filter": {"tenant": {"ne": "acme"}}},
    {"filter": {"tenant": {"not": "acme"}}},
    {"filter": {"$or": [{"tenant": "b"}]}},
    {"filter": {"tenant' OR 1=1 --": "b"}},
    {"filter": {"within": {"gte": 0}}},
    {"filter": {"tenant": [["b"]]}},
    {"is_exact": True},
    {"key": "all"},
    '{"query": "array", "top_k": 1000, "filter": {"tenant": "acme"}, "filter": {"tenant": "b"}}',
    '{"query": "array", "top_k": 1000, "doc_ids": null, "doc_id_prefix": null}',
]


@pytest.mark.parametrize("name", ["acme", "none"])
def test_no_request_leaves_the_filter_of_its_key(tenants, keys, world, name):
    """Versions, splits, shadows and recall probes are as restricted."""
    seen = []
    shadow = dataclasses.replace(tenants, encoded=[])

    def watched(search):
        async def watch(queries, top_k, wanted):
            result = await search(queries, top_k, wanted)
            seen.extend(hit.doc_id for ranked in result.ranked for hit in ranked)
            return result

        return watch

    shadow.search = tenants.search = watched(tenants.search)
    shadow.search_words = tenants.search_words = watched(tenants.search_words)
    routing = Routing(default="tiny", split={"tiny": 0.5, "other": 0.5}, shadow="other", recall_probe=1.0)
    try:
        requests = [(name, body) for body in ATTACKS]
        answers = asked({"tiny": tenants, "other": shadow}, keys, requests, routing=routing)
    finally:
        del tenants.search, tenants.search_words
    for body, answer in zip(ATTACKS, answers, strict=True):
        assert answer.status_code == 400 or found(answer) <= DUE[name], body
    assert set(seen) <= DUE[name]
    assert sum(answer.status_code == 200 for answer in answers) >= 18


def test_vectors_are_as_restricted_as_texts(tenants, keys):
    vector = tenants.encoder.encode(["array"], "query")[0].tolist()
    body = {"query": None, "vector": vector, "fingerprint": tenants.info.encoder_fingerprint}
    (answer,) = asked({"tiny": tenants}, keys, [("both", body)])
    assert found(answer) == DUE["both"]


def test_a_filter_that_cannot_be_applied_finds_nothing(world, keys):
    """The corpus has no such column: the search is refused, not let through."""
    refused, free = asked({"tiny": LocalVersion.load(world)}, keys, [("acme", {}), ("all", {})])
    assert (refused.status_code, free.status_code) == (400, 200)
    assert "no column 'tenant' to filter by; the columns of this corpus are: none" in refused.json()["error"]["message"]


@pytest.mark.parametrize("changes", [{}, {"corpus": None}])
def test_and_a_server_does_not_start_with_one(world, keys, changes):
    config = ServeConfig.parse(world.version() | changes)
    with pytest.raises(
        InputError, match=r"the API key 'acme' cannot search in version 'retriever'.*no column 'tenant'"
    ):
        check_keys(config, keys)
    check_keys(config, [key for key in keys if key.name == "all"])
    elsewhere = [dataclasses.replace(key, domains=frozenset({"other"})) for key in keys]
    both = ServeConfig.parse({"versions": {name: world.version(name) for name in ("retriever", "other")}} | changes)
    with pytest.raises(InputError, match="the API key 'acme' cannot search in version 'other'"):
        check_keys(both, elsewhere)


@pytest.mark.parametrize(
    ("within", "message"),
    [
        ({}, "`within` of 'a' must have `doc_id_prefix`, `doc_ids` or `filter`"),
        ({"filter": {}}, r"within.filter of 'a'"),
        ({"tenant": "acme"}, r"within.tenant of 'a'"),
        (None, r"within of 'a'"),
        ("acme", r"within of 'a'"),
        ({"doc_id_prefix": None}, "must have"),
        ({"doc_id_prefix": ""}, "doc_id_prefix of 'a' is empty"),
    ],
)
def test_a_restriction_that_restricts_nothing_is_refused(tmp_path, within, message):
    file = tmp_path / "keys.yaml"
    file.write_text(json.dumps({"a": {"key": "a-key-of-the-tenant-acme", "within": within}}))
    with pytest.raises(InputError, match=message):
        read_keys(str(file))
