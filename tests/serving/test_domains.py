import asyncio
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from readapt_ray import flags
from readapt_ray.catalog.models import open_model
from readapt_ray.errors import InputError, WeightMismatchError
from readapt_ray.retrieval.domain_encoder import DomainEncoder
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.serving.batching import Batcher
from readapt_ray.serving.domain_app import domain_records
from readapt_ray.serving.domains import DomainBackend, DomainRow, DomainUnavailableError
from readapt_ray.serving.keys import read_keys
from readapt_ray.serving.options import ServeConfig
from readapt_ray.serving.resident_domains import ResidentDomains
from readapt_ray.serving.server import serve, stop
from readapt_ray.serving.versions import Routing, VersionInfo
from readapt_ray.stages.merge import MergeConfig, merge
from readapt_ray.weights.domain_sources import read_domains
from tests import factories
from tests.chaos.nodes import free_port
from tests.serving.conftest import local_server, until

TEXTS = ["the lock of a thread", "a node of the graph", "read and write the file"]
NAMES = ("legal", "med", "tax")


def write_domains(folder):
    """Write a base, a retriever and three domains as factors; yield name and models of each domain."""
    base = factories.tiny_decoder(folder / "base")
    retriever = factories.write_contract(factories.full_retriever(folder / "retriever", base))
    for seed, name in enumerate(NAMES):
        adapter = factories.dora_adapter(folder / f"adapter-{name}", base, seed=10 + seed)
        models = {"pretrained": str(base), "retriever": str(retriever), "adapter": str(adapter)}
        merge(MergeConfig(**models, output=str(folder / name), factors=True))
        yield name, models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, a retriever, three domains as factors, and each as a merged model."""
    folder = tmp_path_factory.mktemp("domains")
    for name, models in write_domains(folder):
        merge(MergeConfig(**models, output=str(folder / f"merged-{name}"), dtype="float32"))
    return folder


class SharedInProcess:
    """The encoder that domains share, in this process."""

    def __init__(self, folder, *, max_bytes=1 << 30):
        records = read_domains({"any": str(folder / "legal")})
        model = open_model(str(folder / "legal"))
        loaded = DomainEncoder(
            model,
            open_model(str(folder / "base")),
            retriever_fingerprint=records[0].retriever_fingerprint,
            dtype="float32",
            max_bytes=max_bytes,
        )
        self.encoder, self.thread, self.batches, self.gate = loaded, ThreadPoolExecutor(1), [], asyncio.Event()
        self.gate.set()
        self.resident = ResidentDomains(loaded, self._compute)
        self.info = VersionInfo(
            fingerprint="shared",
            encoder_fingerprint=loaded.encoder.fingerprint,
            encoding=loaded.encoder.encoding,
            tokenizer=model.tokenizer,
            dimension=loaded.encoder.dimension,
            batch_tokens=512,
            num_slots=1,
        )

    async def _compute(self, function, *given):
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *given)

    async def prepare(self, source):
        await self.resident.domain(source)

    async def encode(self, rows):
        self.batches.append({row.source.name for row in rows})
        await self.gate.wait()
        return await self.resident.encode(rows)

    async def check(self):
        return 0.001


@pytest.fixture
def submitted(monkeypatch):
    """The rows of each request that came to the queue of an encoder."""
    given, submit = [], Batcher.submit

    async def noted(self, rows, **named):
        given.append(rows)
        return await submit(self, rows, **named)

    monkeypatch.setattr(Batcher, "submit", noted)
    return given


def backends(shared, folder, names=NAMES):
    records = read_domains({name: str(folder / name) for name in names})
    return {each.source.name: DomainBackend(shared, each.source) for each in records}


def merged_vectors(folder, name, texts, kind="query"):
    return Encoder.load(open_model(str(folder / f"merged-{name}"))).encode(texts, kind)


async def embed(client, model, texts=TEXTS, **more):
    answer = await client.post("/v1/embeddings", json={"model": model, "input": texts, **more})
    body = answer.json()
    return answer.status_code, np.array([each["embedding"] for each in body["data"]]) if "data" in body else body


def test_requests_of_several_domains_share_a_batch_and_get_the_merged_models_vectors(folder, submitted):
    async def run():
        shared = SharedInProcess(folder)
        async with local_server(backends(shared, folder)) as local, local.client() as client:
            for name in NAMES:
                await embed(client, name)
            shared.gate.clear()
            submitted.clear()
            num_batches = len(shared.batches)
            first = asyncio.create_task(embed(client, "legal", TEXTS[:1]))
            await until(lambda: len(shared.batches) > num_batches)  # the encoder is busy now, and the rest gathers
            asked = [embed(client, name + suffix) for name in NAMES for suffix in ("", "-passage")]
            waiting = [asyncio.create_task(each) for each in asked]
            await until(lambda: len(submitted) == 1 + len(waiting))
            shared.gate.set()
            answers = [await each for each in (first, *waiting)]
            assert shared.batches[-1] == set(NAMES)
            for number, name in enumerate(NAMES):
                for place, kind in enumerate(("query", "passage")):
                    status, found = answers[1 + 2 * number + place]
                    assert status == 200
                    assert (found * merged_vectors(folder, name, TEXTS, kind)).sum(1).min() > 0.99999

    asyncio.run(run())


def test_models_are_listed_and_unknown_names_refused(folder):
    async def run():
        async with local_server(backends(SharedInProcess(folder), folder)) as local, local.client() as client:
            listed = (await client.get("/v1/models")).json()["data"]
            assert [each["id"] for each in listed][:3] == ["legal", "legal-passage", "legal-raw"]
            assert len({each["encoder_fingerprint"] for each in listed}) == 3
            ready = (await client.get("/readyz")).json()
            assert ready["ready"] and len(ready["versions"]) == 1  # one encoder
            status, body = await embed(client, "law")
            assert status == 404 and "'legal', 'med', 'tax'" in body["error"]["message"]
            answer = await client.post("/v1/search", json={"model": "legal", "query": "x"})
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "no_index"

    asyncio.run(run())


def test_a_request_chooses_the_scale_within_what_is_allowed(folder):
    async def run():
        shared = SharedInProcess(folder)
        async with local_server(backends(shared, folder), knowledge_scale="0..0.8") as local, local.client() as client:
            status, before = await embed(client, "med", knowledge_scale=0)
            retriever = Encoder.load(open_model(str(folder / "retriever"))).encode(TEXTS, "query")
            assert status == 200
            np.testing.assert_allclose(before, retriever, atol=1e-5)
            _, default = await embed(client, "med")
            _, same = await embed(client, "med", knowledge_scale=0.5)
            np.testing.assert_allclose(default, same, atol=1e-6)
            answers = [
                (
                    await client.post("/v1/embeddings", json={"model": "med", "input": "x", "knowledge_scale": scale})
                ).json()
                for scale in (0.5, 0.8)
            ]
            assert answers[0]["fingerprint"] != answers[1]["fingerprint"]
            for scale, message in ((0.9, "from 0 to 0.8"), (-0.1, "from 0 to 0.8"), ("1", "must be a finite number")):
                status, body = await embed(client, "med", knowledge_scale=scale)
                assert status == 400 and message in body["error"]["message"], scale
        async with local_server(backends(shared, folder)) as local, local.client() as client:
            status, body = await embed(client, "med", knowledge_scale=0.5)
            assert status == 400 and "start the server with --knowledge-scale" in body["error"]["message"]

    asyncio.run(run())


def test_a_version_has_no_scale_to_choose(fresh):
    async def run():
        async with local_server({"plain": fresh}, knowledge_scale="0..1") as local, local.client() as client:
            status, body = await embed(client, "plain", knowledge_scale=0.5)
            assert status == 400 and "this server has none" in body["error"]["message"]

    asyncio.run(run())


def test_a_corrupt_domain_fails_alone_and_is_not_read_for_each_request(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder / "tax", broken)
    (broken / "knowledge-1/adapter_model.safetensors").write_bytes(b"nothing of a tensor")

    async def run():
        shared = SharedInProcess(folder)
        made = backends(shared, folder, ("legal",)) | {
            "broken": DomainBackend(shared, read_domains({"broken": str(broken)})[0].source)
        }
        async with local_server(made) as local, local.client() as client:
            asked = [embed(client, name) for name in ("legal", "broken") * 20]
            answers = await asyncio.gather(*asked)
            assert {status for status, _ in answers[::2]} == {200}
            for status, body in answers[1::2]:
                assert status == 503 and "domain 'broken' cannot be used" in body["error"]["message"]
            assert not any("broken" in batch for batch in shared.batches)

    asyncio.run(run())


def test_a_copy_of_factors_that_is_gone_fails_alone(folder, tmp_path):
    shutil.copytree(folder / "tax", tmp_path / "gone")

    async def run():
        shared = SharedInProcess(folder)
        records = read_domains({"gone": str(tmp_path / "gone"), "there": str(folder / "tax")})
        gone, there = (each.source for each in records)
        assert gone.fingerprint == there.fingerprint
        shutil.rmtree(tmp_path / "gone")
        with pytest.raises(DomainUnavailableError, match="domain 'gone' cannot be used"):
            await shared.prepare(gone)
        await shared.prepare(there)
        await shared.prepare(gone)  # what it needs is in memory

    asyncio.run(run())


def test_a_domain_that_is_removed_answers_the_requests_that_wait(folder, tmp_path, submitted):
    gone = tmp_path / "gone"
    shutil.copytree(folder / "tax", gone)

    async def run():
        shared = SharedInProcess(folder)
        made = backends(shared, folder, ("legal",))
        removed = {"gone": DomainBackend(shared, read_domains({"gone": str(gone)})[0].source)}
        async with local_server(made | removed) as local, local.client() as client:
            await embed(client, "gone")
            shared.gate.clear()
            submitted.clear()
            waiting = [asyncio.create_task(embed(client, name)) for name in ("gone", "legal", "gone")]
            await until(lambda: len(submitted) == len(waiting))
            await local.service.set_state(made, Routing(default="legal"))
            shutil.rmtree(gone)
            shared.gate.set()
            answers = [await each for each in waiting]
            assert [status for status, _ in answers] == [200, 200, 200]
            assert (answers[0][1] * merged_vectors(folder, "tax", TEXTS)).sum(1).min() > 0.99999
            status, _ = await embed(client, "gone")
            assert status == 404
            assert (await embed(client, "legal"))[0] == 200

    asyncio.run(run())


def test_more_domains_in_a_batch_than_fit_the_memory_go_one_after_the_other(folder, monkeypatch):
    async def run():
        shared = SharedInProcess(folder)
        made = backends(shared, folder)
        size = (await shared.resident.domain(made["legal"].source)).num_bytes
        shared = SharedInProcess(folder, max_bytes=size + 1)
        made = backends(shared, folder)
        together, encode_ids = [], shared.encoder.encoder.encode_ids

        def watched(rows, uses):
            together.append(len({use.domain.name for use in uses if use is not None}))
            return encode_ids(rows, uses)

        monkeypatch.setattr(shared.encoder.encoder, "encode_ids", watched)
        sources = [made[name].source for name in NAMES]
        await shared.encode([DomainRow([1, 5, 9], source, source.scales) for source in sources])
        assert together and max(together) == 1
        async with local_server(made) as local, local.client() as client:
            answers = await asyncio.gather(*(embed(client, name) for name in NAMES * 3))
            for (status, found), name in zip(answers, NAMES * 3, strict=True):
                assert status == 200
                assert (found * merged_vectors(folder, name, TEXTS)).sum(1).min() > 0.99999
            assert shared.encoder.num_bytes <= size + 1

    asyncio.run(run())


def test_a_domain_that_fails_in_the_replica_that_encodes_is_down_and_no_failure(folder, tmp_path):
    """One replica has the domain in memory, and is asked for it; another one encodes."""
    shutil.copytree(folder / "legal", tmp_path / "legal")

    async def run():
        one, other = SharedInProcess(folder), SharedInProcess(folder)
        one.encode = other.encode
        made = backends(one, tmp_path, ["legal"]) | backends(one, folder, ["med"])
        async with local_server(made) as local, local.client() as client:
            await one.prepare(made["legal"].source)
            shutil.rmtree(tmp_path / "legal")
            (status, body), (fine, _) = await asyncio.gather(embed(client, "legal"), embed(client, "med"))
            assert (status, body["error"]["code"], fine) == (503, "domain_unavailable", 200)
            assert "domain 'legal' cannot be used: " in body["error"]["message"]

    asyncio.run(run())


def test_a_flood_of_one_domain_takes_no_place_of_another(folder):
    """200 clients ask one domain at once; without shares they take all places, and the others are refused."""

    async def run():
        shared = SharedInProcess(folder)
        limits = {"max_requests": 40, "max_queued_tokens": 2000}
        async with local_server(backends(shared, folder), **limits) as local, local.client() as client:
            for name in NAMES:
                await embed(client, name)
            shared.gate.clear()
            flood = [asyncio.create_task(embed(client, "legal", TEXTS[0])) for _ in range(200)]
            await until(lambda: sum(each.done() for each in flood) >= 180)  # refused; half of the places are taken
            others = [asyncio.create_task(embed(client, name)) for name in ("med", "tax") * 5]
            await asyncio.sleep(0.3)
            shared.gate.set()
            assert [(await each)[0] for each in others] == [200] * 10
            flooded = Counter([(await each)[0] for each in flood])
            assert set(flooded) == {200, 429} and flooded[200] <= 20
            assert (await embed(client, "legal"))[0] == 200

    asyncio.run(run())


def test_a_domain_that_fails_can_be_asked_again_later(folder, tmp_path, monkeypatch):
    late = tmp_path / "late"
    shutil.copytree(folder / "tax", late)
    monkeypatch.setattr("readapt_ray.serving.resident_domains.FAILED_FOR_S", 3600.0)

    async def run():
        shared = SharedInProcess(folder)
        source = read_domains({"late": str(late)})[0].source
        late.rename(tmp_path / "away")
        for _ in range(2):
            with pytest.raises(DomainUnavailableError, match=r"domain 'late' cannot be used: the factors .* are gone"):
                await shared.prepare(source)
        (tmp_path / "away").rename(late)
        with pytest.raises(DomainUnavailableError):  # the failure is remembered for some seconds
            await shared.prepare(source)
        monkeypatch.setattr("readapt_ray.serving.resident_domains.FAILED_FOR_S", 0.0)
        await shared.prepare(source)

    asyncio.run(run())


def test_a_key_reaches_its_domains_alone(folder, tmp_path):
    keys = tmp_path / "keys.yaml"
    keys.write_text("acme: {key: secret-of-acme-1234, domains: [legal]}\nall: secret-of-all-12345\n")

    async def run():
        made, routing = backends(SharedInProcess(folder), folder), Routing(default="med")
        async with local_server(made, keys=read_keys(str(keys)), routing=routing) as local:
            await local.service.set_state(made, routing, {"lost": "its encoder does not answer"})
            async with local.client(headers={"authorization": "Bearer secret-of-acme-1234"}) as client:
                assert (await embed(client, "legal-passage"))[0] == 200
                status, body = await embed(client, "med")
                assert status == 404 and body["error"]["code"] == "model_not_found"
                assert (await client.get("/v1/models/med")).status_code == 404
                assert (await client.post("/tokenize", json={"model": "med", "prompt": "x"})).status_code == 404
                listed = (await client.get("/v1/models")).json()["data"]
                assert {each["version"] for each in listed} == {"legal"}
                for refused in [
                    await client.post("/v1/embeddings", json={"model": name, "input": "x"})
                    for name in ("med", "nobody", "lost", "default", None)
                ]:
                    assert refused.status_code == 404
                    assert refused.json()["error"]["message"].endswith("for this API key; it has 'legal'")
                assert (await client.get("/info")).status_code == 404
            async with local.client(headers={"authorization": "Bearer secret-of-all-12345"}) as client:
                assert (await embed(client, "med"))[0] == 200

    asyncio.run(run())


def test_the_domains_of_a_key_are_names(tmp_path):
    keys = tmp_path / "keys.yaml"
    for value in ("legal", "[]", "[1]"):
        keys.write_text(f"acme: {{key: secret-of-acme-1234, domains: {value}}}\n")
        with pytest.raises(InputError, match=r"domains of 'acme'.*list of names"):
            read_keys(str(keys))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": "legal=a,legal=b"}, "'legal' is given twice"),
        ({"domains": "legal=a,b"}, "'b' is not NAME=FACTORS"),
        ({"domains": "legal=a", "retriever": "b"}, "or several versions with one each, or domains"),
        ({"domains": "legal=a", "index": "b"}, "domains cannot have index; leave it out"),
        ({"domains": "index=a"}, "belongs to the domain before it"),
        ({"domains": "legal=a,index=b,index=c"}, "belongs to the domain before it; give it once"),
        ({"domains": "legal=a", "knowledge_scale": "1..0"}, r"such as 0\.0\.\.1\.0"),
        ({"domains": "legal=a", "knowledge_scale": "0..inf"}, r"such as 0\.0\.\.1\.0"),
        ({"retriever": "b", "knowledge_scale": "0..1"}, "are for domains"),
        ({"retriever": "b", "base": "c"}, "are for domains"),
        ({"domains": "legal=a", "default": "med"}, "default names 'med', which is not served"),
        ({"domains": "legal=a,legal-passage=b"}, "by 'legal-passage', which is the name of another version or domain"),
        (
            {"versions": {"x-raw": {"retriever": "a"}, "x": {"retriever": "b"}}},
            "'x' for another kind of text by 'x-raw'",
        ),
        ({"domains": {"": "a"}}, "name of a version or domain is empty"),
        ({"domains": "legal=a,index=b,med=c,corpus=d"}, "domain 'med' has no index; give it index=INDEX"),
        ({"domains": "legal=a", "corpus": "d"}, "no domain has an index"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ServeConfig.parse(options)


def test_two_domains_of_one_name_are_refused_wherever_they_are_given(tmp_path):
    file = tmp_path / "domains.yaml"
    file.write_text("legal: a\nmed: {factors: b, index: c, index: d}\n")
    with pytest.raises(InputError, match=r"domains.yaml', line 2: 'index' is given twice; keep one of them"):
        ServeConfig.parse({"domains": str(file)})
    file.write_text("legal: a\nmed: b\n\nlegal: c\n")
    with pytest.raises(InputError, match=r"domains.yaml', line 4: 'legal' is given twice; keep one of them"):
        ServeConfig.parse({"domains": str(file)})
    with pytest.raises(InputError, match="--domains is given twice; give it once, with commas between its values"):
        flags.parse("serve", "Serve.", ServeConfig, ["--domains", "legal=a", "--domains", "med=b"])
    assert flags.parse("serve", "Serve.", ServeConfig, ["--domains", "legal=a,med=b"]).names() == ["legal", "med"]


def test_an_update_cannot_change_the_memory_of_domains():
    (config,) = ServeConfig.parse({"domains": "legal=a", "max_domain_bytes": 5}).each_version().values()
    assert config.processes()["max_domain_bytes"] == 5


def test_domains_come_from_a_file(tmp_path):
    file = tmp_path / "domains.yaml"
    file.write_text("legal: a\nmed: s3://bucket/b\ntax: {factors: c, index: d}\n")
    config = ServeConfig.parse({"domains": str(file), "corpus": "e", "index_replicas": 2})
    assert config.names() == ["legal", "med", "tax"]
    assert config.each_version()["domains"].bundles == ("a", "s3://bucket/b", "c")
    (index,) = config.domain_indexes().values()
    assert (index.index, index.corpus, index.index_replicas, index.num_replicas) == ("d", "e", 2, 0)
    given = "legal=a,index=b,legal-before=a,knowledge_scale=0,index=c"
    assert [each.knowledge_scale for each in ServeConfig.parse({"domains": given}).each_domain().values()] == [None, 0]
    assert (
        ServeConfig.parse({"domains": "legal=a,med=s3://bucket/b,tax=c,index=d"}).each_domain() == config.each_domain()
    )


def test_a_server_does_not_start_with_factors_of_another_base(folder, tmp_path):
    other = factories.tiny_decoder(tmp_path / "other", seed=5)
    domains = f"legal={folder / 'legal'},med={folder / 'med'}"
    assert [each.source.name for each in domain_records(ServeConfig.parse({"domains": domains}))] == ["legal", "med"]
    with pytest.raises(WeightMismatchError, match="domain 'legal' was made of"):
        serve(ServeConfig.parse({"domains": domains, "base": str(other), "port": free_port()}), blocking=False)


@pytest.mark.slow
def test_domains_are_served_added_and_removed_on_ray(ray_session, folder, tmp_path):
    keys = tmp_path / "keys.yaml"
    keys.write_text("acme: {key: secret-of-acme-1234, domains: [law]}\n")
    first = {"base": str(folder / "base"), "domains": f"legal={folder / 'legal'},med={folder / 'med'}"}
    port = free_port()
    with pytest.raises(InputError, match="'acme' names 'law', which is not served"):
        serve(ServeConfig.parse(first | {"port": port, "api_keys": str(keys)}), blocking=False)
    url = serve(ServeConfig.parse(first | {"port": port}), blocking=False)
    try:
        with httpx.Client(base_url=url, timeout=60) as client:

            def vectors(name):
                answer = client.post("/v1/embeddings", json={"model": name, "input": TEXTS})
                return answer.status_code, [each["embedding"] for each in answer.json().get("data", [])]

            for name in ("legal", "med"):
                status, found = vectors(name)
                assert status == 200
                assert (np.array(found) * merged_vectors(folder, name, TEXTS)).sum(1).min() > 0.99999
            assert vectors("tax")[0] == 404
            second = first | {"domains": f"med={folder / 'med'},tax={folder / 'tax'}"}
            serve(ServeConfig.parse(second | {"port": port, "update": True}), blocking=False)
            assert [vectors(name)[0] for name in NAMES] == [404, 200, 200]
    finally:
        stop()
