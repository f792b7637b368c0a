"""Which version answers, and what goes along unseen: names, splits, switches, shadows and probes; without Ray."""

import asyncio
import collections
import hashlib
import re

import pytest

from readapt_ray.serving import telemetry
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.keys import ApiKey
from readapt_ray.serving.versions import Found, Routing
from tests.serving.conftest import LocalVersion, local_server, until

TEXTS = ["array shape", "lock a thread", "write the file"]
EMBEDDINGS, SEARCH = "/v1/embeddings", "/v1/search"


def test_a_request_names_its_version_or_gets_the_default(version, world):
    versions = {"base": LocalVersion.load(world, "other"), "adapted": version}

    async def run():
        async with local_server(versions) as server, server.client() as client:

            async def model(path, **body):
                field = "input" if path == EMBEDDINGS else "query"
                return (await client.post(path, json={field: "array", **body})).json()["model"]

            assert await model(EMBEDDINGS) == await model(EMBEDDINGS, model="default") == "base"
            assert await model(EMBEDDINGS, model="adapted") == "adapted"
            assert await model(SEARCH) == "base"
            await server.service.set_state(versions, Routing(default="base", split={"adapted": 1.0}))
            assert (await model(SEARCH), await model(SEARCH, model="default")) == ("adapted", "base")
            assert await model(SEARCH, model="base") == "base"
            # Vectors of two encoders do not go together: a split is for searches alone.
            assert await model(EMBEDDINGS) == "base"

    asyncio.run(run())


def test_the_default_changes_between_two_requests_and_none_fails(fresh, world):
    base, fresh.delay_s = LocalVersion.load(world, "other"), 0.01
    base.delay_s = 0.01

    async def run():
        async with local_server({"base": base}) as server, server.client() as client:
            answers, changed = [], asyncio.Event()

            async def ask_on():
                while not changed.is_set() or answers[-1]["model"] == "base":
                    answer = await client.post(SEARCH, json={"query": "array shape", "top_k": 3})
                    assert answer.status_code == 200, answer.text
                    answers.append(answer.json())

            clients = [asyncio.create_task(ask_on()) for _ in range(8)]
            await until(lambda: answers)
            await server.service.set_state({"base": base, "adapted": fresh}, Routing(default="adapted"))
            changed.set()
            await asyncio.wait_for(asyncio.gather(*clients), 300)
            return answers

    answers = asyncio.run(run())
    assert {answer["model"] for answer in answers} == {"base", "adapted"}
    # Each answer is of one unit: the hits are those that its own encoder and index give.
    for name, version in (("base", base), ("adapted", fresh)):
        assert {each["fingerprint"] for each in answers if each["model"] == name} == {version.info.fingerprint}
        assert len({str(each["data"]) for each in answers if each["model"] == name}) == 1


def test_a_shadow_searches_along_and_is_compared(fresh, world):
    other, compared = LocalVersion.load(world, "other"), []

    async def run():
        routing = Routing(default="base", shadow="adapted", shadow_share=1.0)
        versions = {"base": other, "adapted": fresh}
        async with local_server(versions, routing=routing) as server, server.client() as client:
            server.service._telemetry.compared = lambda *values: compared.append(values)
            answer = await client.post(SEARCH, json={"query": TEXTS, "top_k": 10, "with_text": False})
            assert answer.json()["model"] == "base"
            await asyncio.wait_for(asyncio.gather(*server.service.side_searches.tasks), 300)
            named = await client.post(SEARCH, json={"query": TEXTS, "model": "adapted", "with_text": False})
            return answer.json()["data"], named.json()["data"]

    mine, its = asyncio.run(run())
    assert len(compared) == len(TEXTS)
    for left, right, (base, shadow, num_shared, num_expected, difference) in zip(mine, its, compared, strict=True):
        ids = [{hit["doc_id"] for hit in each["hits"]} for each in (left, right)]
        assert (base, shadow) == ("base", "adapted")
        assert (num_shared, num_expected) == (len(ids[0] & ids[1]), 10)
        assert difference == pytest.approx(right["hits"][0]["score"] - left["hits"][0]["score"], abs=1e-6)


def test_what_the_index_misses_is_probed(fresh, world):
    probed = []

    async def run():
        routing = Routing(default="base", recall_probe=1.0)
        async with local_server({"base": fresh}, routing=routing) as server, server.client() as client:
            server.service._telemetry.probed = lambda *values: probed.append(values)
            searched, search = [], fresh.search

            async def missing_its_best(vectors, top_k, wanted):
                searched.append(wanted)
                found = await search(vectors, top_k, wanted)
                return found if wanted else Found([ranked[1:] for ranked in found.ranked], [])

            fresh.search = missing_its_best
            for body in ({"query": "array", "top_k": 4}, {"query": "array", "doc_id_prefix": "d"}):
                assert (await client.post(SEARCH, json=body)).status_code == 200
                await asyncio.wait_for(asyncio.gather(*server.service.side_searches.tasks), 300)
            return searched

    searched = asyncio.run(run())
    assert probed == [("base", 3, 4)]
    assert searched == [None, DocFilter(is_exact=True), DocFilter(prefix="d")], "a filtered search is not probed"


def test_the_recall_of_an_exact_index_is_one_to_the_last_digit(fresh, monkeypatch):
    """Ray exports sums of histograms from the middles of their buckets, so shares are two counters each."""
    totals, observed = collections.Counter(), []

    class Counter:
        def __init__(self, name, *_):
            self.name = name

        def inc(self, number, tags):
            totals[self.name, tags.get("shadow", "")] += number

    class Histogram(Counter):
        def observe(self, number, tags):
            observed.append(self.name)

    monkeypatch.setattr(telemetry, "Counter", Counter)
    monkeypatch.setattr(telemetry, "Histogram", Histogram)
    measured = telemetry.Telemetry()

    async def run():
        routing = Routing(default="base", shadow="same", shadow_share=1.0, recall_probe=1.0)
        async with local_server({"base": fresh, "same": fresh}, routing=routing) as server, server.client() as client:
            monkeypatch.setattr(server.service, "_telemetry", measured)
            for text in TEXTS:
                await client.post(SEARCH, json={"query": text, "with_text": False})
                await asyncio.wait_for(asyncio.gather(*server.service.side_searches.tasks), 300)

    asyncio.run(run())
    assert totals["readapt_recall_found", ""] == totals["readapt_recall_due", ""] == 10 * len(TEXTS)
    assert totals["readapt_shadow_shared", "same"] == totals["readapt_shadow_due", "same"] == 10 * len(TEXTS)
    totals.clear()
    measured.batch("base", budget=64, num_rows=2, num_tokens=48, seconds=0.1)
    assert (totals["readapt_batch_tokens", ""], totals["readapt_batch_budget", ""]) == (48, 64)
    assert not {name for name in observed if re.search("recall|shared|overlap|fill", name)}


def test_a_shadow_that_fails_is_nobodys_trouble(fresh, world):
    fresh.broken = "out of memory"

    async def run():
        routing = Routing(default="base", shadow="adapted", shadow_share=1.0)
        versions = {"base": LocalVersion.load(world, "other"), "adapted": fresh}
        async with local_server(versions, routing=routing) as server, server.client() as client:
            answer = await client.post(SEARCH, json={"query": "array"})
            await asyncio.gather(*server.service.side_searches.tasks)
            return answer

    assert asyncio.run(run()).status_code == 200


def test_a_split_gives_a_key_of_one_version_that_version_alone(world):
    """Also by vectors that the encoder of several versions made."""
    secret = "a-key-of-the-version-adapted"
    keys = [ApiKey("acme", hashlib.sha256(secret.encode()).hexdigest(), domains=frozenset({"adapted"}))]
    versions = {name: LocalVersion.load(world) for name in ("base", "adapted")}
    routing = Routing(default="base", split={"base": 0.5, "adapted": 0.5})

    async def run():
        vector = world.encoder.encode(["array"], "query")[0].tolist()
        by_vector = {"vector": vector, "fingerprint": world.encoder.fingerprint}
        headers = {"authorization": f"Bearer {secret}"}
        async with (
            local_server(versions, routing=routing, keys=keys) as server,
            server.client(headers=headers) as client,
        ):
            bodies = [by_vector, *({"query": "array", "user": f"user {number}"} for number in range(12))]
            answers = [await client.post(SEARCH, json=body) for body in bodies]
        assert {(each.status_code, each.json().get("model")) for each in answers} == {(200, "adapted")}

    asyncio.run(run())
