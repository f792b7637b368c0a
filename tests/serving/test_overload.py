"""What one client costs the others: checks without a key, bodies that do not come, searches that nobody waits for."""

import asyncio

import pytest

from readapt_ray.serving import guard as guard_module
from readapt_ray.serving import hit_texts, readiness, search_service, shadow_and_probe
from readapt_ray.serving.versions import Routing
from tests.serving.conftest import LocalVersion, local_server, until

EMBEDDINGS, SEARCH = "/v1/embeddings", "/v1/search"


def test_one_check_answers_all_who_ask_whether_the_server_is_ready(fresh, monkeypatch):
    asked, result = [], readiness.CachedCall.result

    async def counted(self):
        asked.append(self)
        return await result(self)

    monkeypatch.setattr(readiness.CachedCall, "result", counted)
    monkeypatch.setattr(readiness, "_RECENT_S", 1000.0)

    async def run():
        async with local_server({"tiny": fresh}) as server, server.client() as client:

            async def statuses(number):
                asked.clear()
                fresh.gate = asyncio.Event()
                answers = [asyncio.create_task(client.get("/readyz")) for _ in range(number)]
                await until(lambda: len(asked) == number)  # the check is not over before all have asked
                fresh.gate.set()
                return {(await answer).status_code for answer in answers}

            assert await statuses(50) == {200}
            assert await statuses(1) == {200}
            assert len(fresh.encoded) == 1
            fresh.broken = "out of memory"
            monkeypatch.setattr(readiness, "_RECENT_S", 0.0)
            assert await statuses(50) == {503}
            assert len(fresh.encoded) == 2
            monkeypatch.setattr(readiness, "_RECENT_S", 1000.0)
            fresh.broken = ""
            assert await statuses(1) == {503}
            await server.service.set_state({"tiny": fresh}, Routing(default="tiny"))
            assert await statuses(1) == {200}, "what was found of the versions before says nothing of these"

    asyncio.run(run())


def test_metrics_are_gathered_once_for_all_who_ask(monkeypatch):
    monkeypatch.setattr(readiness, "_RECENT_S", 1000.0)

    async def run():
        asked = []

        async def gather():
            asked.append(len(asked))
            await asyncio.sleep(0.05)
            return f"page {len(asked)}"

        cached = readiness.CachedCall(gather)
        assert set(await asyncio.gather(*(cached.result() for _ in range(50)))) == {"page 1"}
        assert await cached.result() == "page 1"
        monkeypatch.setattr(readiness, "_RECENT_S", 0.0)
        assert await cached.result() == "page 2"

    asyncio.run(run())


class SlowClient:
    """A POST whose body comes a part at a time, when a test says so, and whose answer may stay unread."""

    def __init__(self, app, *, reads: bool = True, method: str = "POST", path: str = EMBEDDINGS) -> None:
        self._reads = reads
        self._parts: asyncio.Queue[dict] = asyncio.Queue()
        self._sent: list[dict] = []
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "query_string": b"",
        }
        self._task = asyncio.create_task(app(scope, self._parts.get, self._send))

    async def _send(self, message) -> None:
        if not self._reads:
            await asyncio.Event().wait()
        self._sent.append(message)

    def gives(self, body: bytes, *, is_last: bool = False) -> None:
        self._parts.put_nowait({"type": "http.request", "body": body, "more_body": not is_last})

    def leaves(self) -> None:
        self._parts.put_nowait({"type": "http.disconnect"})

    async def status(self) -> int:
        """Of the answer; 0 where there is none."""
        await asyncio.wait_for(self._task, 300)
        return self._sent[0]["status"] if self._sent else 0


def test_a_body_that_does_not_come_takes_nobodys_place(version, monkeypatch):
    monkeypatch.setattr(guard_module, "_IDLE_S", 3600.0)

    async def run():
        async with (
            local_server({"tiny": version}, max_requests=2, timeout_s=600.0) as server,
            server.client() as client,
        ):
            slow = [SlowClient(server.app) for _ in range(2)]
            for each in slow:
                each.gives(b'{"input"')
            await until(lambda: server.app._buffered_bytes == 2 * len(b'{"input"'))
            assert (await client.post(EMBEDDINGS, json={"input": "a"})).status_code == 200
            more = [SlowClient(server.app) for _ in range(33)]
            assert await more[-1].status() == 429
            assert (await client.get("/healthz")).status_code == 200
            pass_time(700.0)
            assert [await each.status() for each in (*slow, *more[:-1])] == [408] * 34
            assert (await client.post(EMBEDDINGS, json={"input": "a"})).status_code == 200
            assert server.app._buffered_bytes == 0

    asyncio.run(run())


def pass_time(seconds):
    """Let seconds go by on the clock of the event loop."""
    loop = asyncio.get_running_loop()
    time = loop.time
    loop.time = lambda: time() + seconds


@pytest.mark.parametrize(("method", "path"), [("GET", "/healthz"), ("POST", "/docs"), ("GET", "/v1/models")])
def test_no_body_is_waited_for_where_none_is_read(version, method, path):
    """Such a request needs no key, and would fill the places of requests that have one."""

    async def run():
        async with local_server({"tiny": version}, max_requests=1) as server, server.client() as client:
            slow = [SlowClient(server.app, method=method, path=path) for _ in range(40)]
            assert {await each.status() for each in slow} == {405 if method == "POST" else 200}
            assert (await client.post(EMBEDDINGS, json={"input": "a"})).status_code == 200

    asyncio.run(run())


def test_a_body_that_stops_is_given_up(version, monkeypatch):
    monkeypatch.setattr(guard_module, "_IDLE_S", 0.2)

    async def run():
        async with local_server({"tiny": version}) as server:
            stopped = SlowClient(server.app)
            stopped.gives(b"{")
            assert await stopped.status() == 408

    asyncio.run(run())


def test_an_answer_that_nobody_reads_gives_its_place_back(fresh, monkeypatch):
    monkeypatch.setattr(guard_module, "_SEND_S", 0.2)

    async def run():
        async with local_server({"tiny": fresh}, max_requests=1) as server, server.client() as client:
            fresh.gate = asyncio.Event()
            deaf = SlowClient(server.app, reads=False)
            deaf.gives(b'{"input": "a"}', is_last=True)
            await until(lambda: server.app._under_way)
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.post(EMBEDDINGS, json={"input": "a"})).status_code == 429
            fresh.gate.set()
            assert await deaf.status() == 0
            assert (await client.post(EMBEDDINGS, json={"input": "a"})).status_code == 200

    asyncio.run(run())


def test_bodies_together_are_bounded_and_one_alone_is_not(version, monkeypatch):
    monkeypatch.setattr(guard_module, "_BUFFERED_BYTES", 100)

    async def run():
        async with local_server({"tiny": version}) as server, server.client() as client:
            first = SlowClient(server.app)
            first.gives(b" " * 90)
            await until(lambda: server.app._buffered_bytes == 90)
            refused = await client.post(EMBEDDINGS, json={"input": "array " * 10})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_bytes")
            assert int(refused.headers["retry-after"]) >= 1
            first.leaves()
            assert await first.status() == 0
            alone = await client.post(EMBEDDINGS, json={"input": "array " * 50, "truncate": True})
            assert alone.status_code == 200
            assert server.app._buffered_bytes == 0

    asyncio.run(run())


def test_shadow_searches_do_not_pile_up(fresh, world):
    over = asyncio.Event()
    begun = []

    async def run():
        routing = Routing(default="base", shadow="adapted", shadow_share=1.0)
        versions = {"base": LocalVersion.load(world, "other"), "adapted": fresh}
        search = fresh.search

        async def slow(*given):
            begun.append(given)
            await over.wait()
            return await search(*given)

        fresh.search = slow
        async with local_server(versions, routing=routing) as server, server.client() as client:
            for _ in range(20):
                assert (await client.post(SEARCH, json={"query": "array"})).status_code == 200
            await until(lambda: len(begun) == shadow_and_probe._MAX_SEARCHES)
            assert len(server.service.side_searches.tasks) == shadow_and_probe._MAX_SEARCHES
            over.set()
            await asyncio.gather(*server.service.side_searches.tasks)
            await client.post(SEARCH, json={"query": "array"})
            await asyncio.gather(*server.service.side_searches.tasks)
            assert len(begun) == shadow_and_probe._MAX_SEARCHES + 1

    asyncio.run(run())


@pytest.mark.parametrize("body", [{"query": ["array", "lock"] * 10, "top_k": 40}])
def test_a_large_answer_is_written_off_the_event_loop_and_is_the_same(version, monkeypatch, body):
    async def run():
        async with local_server({"tiny": version}) as server, server.client() as client:
            found = []
            for inline in (0, 10_000):
                monkeypatch.setattr(search_service, "INLINE_HITS", inline)
                found.append((await client.post(SEARCH, json=body)).json())
            return found

    in_a_thread, inline = asyncio.run(run())
    assert in_a_thread == inline
    assert sum(len(each["hits"]) for each in inline["data"]) == 20 * 40


def test_the_texts_of_an_answer_are_bounded(version, monkeypatch):
    monkeypatch.setattr(hit_texts, "_READ_AT_ONCE", 2)

    async def run():
        async with local_server({"tiny": version}) as server, server.client() as client:

            async def ask(**body):
                return await client.post("/v1/search", json={"query": ["array", "array"], "top_k": 5} | body)

            hits, again = (each["hits"] for each in (await ask()).json()["data"])
            assert hits == again and len(hits) == 5
            size = 2 * sum(len(hit["title"]) + len(hit["text"]) for hit in hits)
            monkeypatch.setattr(hit_texts, "_MAX_CHARACTERS", size)
            assert (await ask()).status_code == 200
            monkeypatch.setattr(hit_texts, "_MAX_CHARACTERS", size - 1)
            refused = await ask()
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "answer_too_large")
            assert (await ask(with_text=False)).status_code == (await ask(top_k=2)).status_code == 200

    asyncio.run(run())


def test_what_cannot_be_done_in_time_is_refused_at_once(world):
    """Not with 504 after the time is up, with the work thrown away."""

    async def run():
        slow = LocalVersion.load(world, batch_tokens=100)
        slow.delay_s = 2.0
        async with local_server({"tiny": slow}, timeout_s=40.0) as server, server.client() as client:
            assert (await client.post(EMBEDDINGS, json={"input": ["array"] * 20})).status_code == 200
            refused = await client.post(EMBEDDINGS, json={"input": ["array"] * 2000})
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (413, "request_too_large")
            fitting = int(error["message"].split("send at most ")[1].split(" such")[0])
            assert "higher --timeout-s" in error["message"]
            slow.delay_s = 0.0
            assert (await client.post(EMBEDDINGS, json={"input": ["array"] * (fitting // 2)})).status_code == 200

    asyncio.run(run())


def test_a_server_that_stops_ends_what_is_under_way_and_takes_nothing_new(fresh):
    async def run():
        async with local_server({"tiny": fresh}) as server, server.client() as client:
            fresh.gate = asyncio.Event()
            running = asyncio.create_task(client.post(EMBEDDINGS, json={"input": "first"}))
            await until(lambda: fresh.encoded)
            assert server.app.stop_accepting() == 1
            new, ready, alive = (
                await client.post(EMBEDDINGS, json={"input": "second"}),
                await client.get("/readyz"),
                await client.get("/healthz"),
            )
            assert (new.status_code, new.headers["retry-after"], new.json()["error"]["code"]) == (503, "1", "stopping")
            assert (ready.status_code, alive.status_code) == (503, 200)
            fresh.gate.set()
            assert (await running).status_code == 200
            assert server.app.stop_accepting() == 0

    asyncio.run(run())


def test_what_is_not_done_when_a_server_gives_up_is_told_to_come_back(fresh):
    async def run():
        async with local_server({"tiny": fresh}) as server, server.client() as client:
            fresh.gate = asyncio.Event()
            running = asyncio.create_task(client.post(EMBEDDINGS, json={"input": "first"}))
            await until(lambda: fresh.encoded)
            assert server.app.stop_accepting(give_up=True) == 1
            answer = await running
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert server.app.stop_accepting() == 0

    asyncio.run(run())
