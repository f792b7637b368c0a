"""Calls from web pages of other origins (CORS)."""

import asyncio

from readapt_ray.serving.guard import with_cors
from tests.serving.conftest import local_server

PAGE = "https://app.example"
PREFLIGHT = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}


def answers(version, origins):
    async def run():
        async with local_server({"tiny": version}) as server:
            if origins:
                server.app = with_cors(server.app, origins)
            async with server.client() as client:
                return (
                    await client.options("/v1/embeddings", headers=PREFLIGHT),
                    await client.post("/v1/embeddings", json={"input": "array"}, headers={"origin": PAGE}),
                    await client.post("/v1/embeddings", json={"input": ""}, headers={"origin": PAGE}),
                )

    return asyncio.run(run())


def test_a_page_may_call_where_its_origin_is_listed(version):
    for origins, shown in (([PAGE], PAGE), (["*"], "*")):
        preflight, answered, refused = answers(version, origins)
        assert (preflight.status_code, answered.status_code, refused.status_code) == (200, 200, 400)
        assert {each.headers["access-control-allow-origin"] for each in (answered, refused)} == {shown}
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()


def test_no_page_may_call_otherwise(version):
    for origins in ([], ["https://other.example"]):
        preflight, answered, _ = answers(version, origins)
        assert preflight.status_code in (400, 405)
        assert "access-control-allow-origin" not in answered.headers
