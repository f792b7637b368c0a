"""Options of `serve` reach the processes that Ray Serve starts, and the gateway. No Ray is started."""

from pathlib import Path
from typing import Any

import pytest

from readapt_ray import generations
from readapt_ray.config import Config
from readapt_ray.errors import InputError
from readapt_ray.serving import app
from readapt_ray.serving import gateway as gateway_module
from readapt_ray.serving.keys import ApiKey
from readapt_ray.serving.options import ServeConfig
from readapt_ray.stages.search import SearchConfig
from readapt_ray.storage import Location
from tests.serving.conftest import World


def deployment(bound: Any) -> Any:
    return bound._bound_deployment


def test_the_options_of_processes_are_what_ray_serve_is_asked_for(world: World) -> None:
    options = {"num_replicas": 3, "num_cpus_per_replica": 1.5, "num_gpus_per_replica": 0.25, "num_threads": 2}
    options |= {"index_actors": 2, "index_replicas": 4, "num_cpus_per_index_actor": 0.75, "batch_tokens": 77}
    encoder = deployment(app.version({"name": "tiny", **world.version(), **options}))
    spec, *slices = encoder.init_args
    assert encoder.num_replicas == 3
    asked = encoder._replica_config.ray_actor_options
    assert (asked["num_cpus"], asked["num_gpus"]) == (1.5, 0.25)
    assert (spec.num_threads, spec.batch_tokens, spec.num_slots) == (2, 77, 3)
    assert [deployment(each).num_replicas for each in slices] == [4, 4]
    assert {deployment(each)._replica_config.ray_actor_options["num_cpus"] for each in slices} == {0.75}


def test_several_gateways_share_the_rate_of_each_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    key = ApiKey(name="a", sha256="0" * 64, requests_per_minute=90)
    config = world.config(num_gateways=3, max_requests=10, timeout_s=45, drain_s=7, cors_origins=["https://a"])
    setup, state = app.gateway_of(config, (key,))
    bound = deployment(app.bind_gateway(setup, state))
    assert bound.num_replicas == 3
    assert bound.max_ongoing_requests == 2 * 10 + 64
    assert bound._deployment_config.graceful_shutdown_timeout_s == 45
    seen: dict[str, Any] = {}

    class Keys:
        def __init__(self, keys: Any, *, share: float) -> None:
            seen.update(shared=keys, share=share)

    monkeypatch.setattr(gateway_module, "KeyRing", Keys)
    monkeypatch.setattr(gateway_module, "_sees_clients", lambda: True)
    monkeypatch.setattr(gateway_module, "Guard", lambda *_, **options: seen.update(options))
    monkeypatch.setattr(gateway_module, "with_cors", lambda _, origins: seen.update(origins=origins))
    [ours] = [each for each in bound.func_or_class.__mro__ if "__serve_build_asgi_app__" in vars(each)]
    ours(setup).__serve_build_asgi_app__()
    assert (seen["shared"], seen["share"], seen["origins"]) == ((key,), 1 / 3, ("https://a",))
    assert seen["limits"].max_requests == 10


def test_domains_may_take_as_much_memory_as_is_said() -> None:
    (shared,) = ServeConfig.parse({"domains": "legal=a", "max_domain_bytes": 5}).each_version().values()
    assert shared.max_domain_bytes == 5  # type: ignore[attr-defined]


@pytest.fixture
def root(tmp_path: Path) -> Location:
    """A root with three generations, of which the first was cleaned away."""
    made = [
        generations.Generation(
            number=number,
            what="refresh",
            created="2026-01-01T00:00:00+00:00",
            seconds=1.0,
            settings={"retriever": f"model-{number}"},
            source_fingerprint="",
            artifacts={"corpus": f"generations/{number}/corpus", "index": f"generations/{number}/index"},
            freed=number == 1,
        )
        for number in (1, 2, 3)
    ]
    location = Location(str(tmp_path / "root"))
    generations.write(location, made)
    return location


@pytest.mark.parametrize(
    ("config_class", "values"), [(ServeConfig, {}), (SearchConfig, {"queries": "q", "output": "o.trec"})]
)
def test_the_generation_is_the_one_that_is_asked_for(
    root: Location, config_class: type[Config], values: dict[str, Any]
) -> None:
    for number, found in ((None, 3), (3, 3), (2, 2), ("2", 2)):
        config: Any = config_class.parse({"root": root.uri, "as_of": number, **values})
        assert (config.retriever, config.index) == (f"model-{found}", f"{root.uri}/generations/{found}/index")
        if config_class is ServeConfig:
            assert config.corpus == f"{root.uri}/generations/{found}/corpus"
    own: Any = config_class.parse({"root": root.uri, "as_of": 2, "retriever": "mine", **values})
    assert (own.retriever, own.index) == ("mine", f"{root.uri}/generations/2/index")
    for number, said in ((1, "was removed by `readapt clean`"), (9, "does not exist; existing generations: 2, 3")):
        with pytest.raises(InputError, match=f"generation {number} of .* {said}"):
            config_class.parse({"root": root.uri, "as_of": number, **values})
    with pytest.raises(InputError, match="as_of = 2 needs a root"):
        config_class.parse({"as_of": 2, "retriever": "m", "index": "i", **values})
