"""Versions that no node has room for are refused before anything is deployed; on nodes that are made up, without Ray."""

import types
from collections.abc import Callable
from typing import Any

import pytest

from readapt_ray.errors import InputError
from readapt_ray.serving import room, server
from readapt_ray.serving.options import ServeConfig, VersionConfig
from readapt_ray.serving.slice_plan import planned_slices
from readapt_ray.storage import Location

GIB = 2**30
Nodes = Callable[..., None]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """Sets the nodes: CPUs, GiB of memory, and GPUs if any, of each. `free` has what is free at each look, by default all; the last one stays."""
    monkeypatch.setattr(room, "_SETTLED_S", 0.5)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})

    def set_nodes(*whole: tuple[float, ...], free: Any = None, labels: Any = None) -> None:
        def resources(view: Any) -> dict[str, dict[str, float]]:
            return {
                str(place): {"CPU": cpus, "memory": gib * GIB, "GPU": sum(gpus)}
                for place, (cpus, gib, *gpus) in enumerate(view)
            }

        views = [resources(view) for view in free or [whole]]
        up = [
            {"Alive": True, "NodeID": key, "NodeManagerAddress": f"10.0.0.{key}", "Resources": each, "Labels": labels}
            for key, each in resources(whole).items()
        ]
        gone = {"Alive": False, "NodeID": "9", "NodeManagerAddress": "10.0.0.9", "Resources": {"CPU": 99.0}}
        monkeypatch.setattr("ray.nodes", lambda: [*up, gone])
        monkeypatch.setattr(
            "ray._private.state.available_resources_per_node", lambda: views.pop(0) if len(views) > 1 else views[0]
        )

    return set_nodes


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[VersionConfig]]:
    """Returns a version whose index has three flat shards of so many GiB, which are mapped: in two slices, or in as many as given."""

    def make(gib: float, factory: str = "Flat", **options: Any) -> list[VersionConfig]:
        sums = {"index_sha256": "", "ids_sha256": "", "factory": factory}
        shards = [{"name": name, "num_bytes": round(gib * GIB), "num_vectors": 1} | sums for name in "abc"]
        manifest = types.SimpleNamespace(details={"shards": shards})
        index = types.SimpleNamespace(manifest=manifest, location=Location("/nowhere"))
        monkeypatch.setattr("readapt_ray.retrieval.vector_index.open_artifact", lambda *_: index)
        config = {"retriever": "r", "index": "i", "index_actors": 2, "num_cpus_per_replica": 1.0} | options
        return [ServeConfig.parse(config).each_version()["r"]]

    return make


def test_an_index_that_memory_has_no_room_for_is_refused(
    nodes: Nodes, version: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes((8, 12.1))
    room.check_room(version(2))
    nodes((8, 12.1), free=[[(8, 1)], [(8, 12.1)]])
    with monkeypatch.context() as patch:
        patch.setattr(room, "_SETTLED_S", 300.0)
        room.check_room(version(2))  # what ended gives its part back soon
    nodes((8, 12), free=[[(8, 11)]])
    with pytest.raises(InputError, match=r"ask for 12\.0 GiB memory, and 11\.0 GiB of 12\.0 GiB are free"):
        room.check_room(version(4))


def test_two_nodes_hold_what_each_of_them_has_room_for(nodes: Nodes, version: Any) -> None:
    """Slices of 8 and 4 GiB. What is free in all of the nodes is not free in one of them."""
    nodes((8, 8.1), (8, 4.1))
    room.check_room(version(4))
    nodes((8, 6.1), (8, 6.1))
    said = (
        r"have a process of \d\S* CPU, 8\.0 GiB memory, and no node has that free beside the others: "
        r"10\.0\.0\.0 \(0\) has 8 CPU, 6\.1 GiB memory; 10\.0\.0\.1 \(1\) has 8 CPU, 6\.1 GiB memory; raise index_actors"
    )
    with pytest.raises(InputError, match=said):
        room.check_room(version(4))
    nodes((8, 8.1), (8, 4.1))
    room.check_room(version(4, index_actors=3))
    nodes((8, 8.1), (8, 4.1), free=[[(8, 8.1), (8, 3)]])
    with pytest.raises(InputError, match=r"ask for 12\.0 GiB memory, and 11\.1 GiB of 12\.2 GiB are free"):
        room.check_room(version(4))


def test_processes_that_nodes_have_no_cpus_for_are_refused(nodes: Nodes, version: Any) -> None:
    nodes((0, 64), (1, 64), (1, 64))
    room.check_room(version(1, num_cpus_per_index_actor=0.0, num_replicas=2))
    with pytest.raises(InputError, match=r"ask for 3 CPU, and 2 of 2 are free"):
        room.check_room(version(1, num_cpus_per_index_actor=0.0, num_replicas=3))
    with pytest.raises(
        InputError, match=r"have a process of 1\.5 CPU, and no node has that free.*10\.0\.0\.1 \(1\) has 1 CPU;"
    ):
        room.check_room(version(1, num_cpus_per_index_actor=0.0, num_cpus_per_replica=1.5))


def test_an_index_on_gpus_asks_for_gpus_and_not_for_the_memory_of_its_vectors(nodes: Nodes, version: Any) -> None:
    for gpus in (1.0, 0.4):
        nodes((8, 1, 2 * gpus))
        room.check_room(version(40, "SQfp16", num_gpus_per_index_actor=gpus))
    nodes((8, 1, 1))
    with pytest.raises(InputError, match=r"ask for 2 GPU, and 1 of 1 are free.*lower .*num_gpus_per_index_actor"):
        room.check_room(version(40, num_gpus_per_index_actor=1))
    nodes((8, 1, 2))
    with pytest.raises(InputError, match=r"ask for 3 GPU, and 2 of 2 are free"):  # the encoder wants one of its own
        room.check_room(version(40, num_gpus_per_index_actor=1, num_gpus_per_replica=1))


def test_an_index_that_no_gpu_can_search_is_refused(version: Any) -> None:
    (config,) = version(1, "IVF64,Flat", num_gpus_per_index_actor=0.5)
    with pytest.raises(
        InputError, match=r"num_gpus_per_index_actor = 0\.5, but the index 'i' is of kind IVF64,Flat, and GPUs"
    ):
        planned_slices(config)
    (config,) = version(1, num_gpus_per_index_actor=1, bridge="b", new_vectors="v")
    with pytest.raises(
        InputError, match=r"while passages move to new_vectors the CPU searches; leave num_gpus_per_index_actor out"
    ):
        planned_slices(config)


def test_where_nodes_may_come_nothing_is_refused(nodes: Nodes, version: Any) -> None:
    nodes((8, 8.1), labels={"ray.io/node-group": "workers"})
    room.check_room(version(5, num_gpus_per_replica=1))


def test_an_index_of_a_terabyte_is_refused_at_once_also_at_the_first_start(
    nodes: Nodes, version: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_SETTLED_S", 3600.0)
    nodes((8, 12))
    added = version(1024)
    with pytest.raises(InputError, match=r"ask for 3072\.0 GiB memory, and 12\.0 GiB of 12\.0 GiB are free"):
        room.check_room(added)
    first = ServeConfig.parse({"retriever": "r", "index": "i", "index_actors": 2})
    monkeypatch.setattr(server.connection, "connect", lambda: None)
    monkeypatch.setattr(server, "stop", lambda: None)
    monkeypatch.setattr("ray.serve.status", lambda: types.SimpleNamespace(applications={}))
    with pytest.raises(InputError, match=r"ask for 3072\.0 GiB memory"):
        server._deploy(first, (), "http://127.0.0.1:1", {})
