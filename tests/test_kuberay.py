"""The KubeRay files against the definitions of KubeRay 1.7.0, and the NetworkPolicy for each pair of pods.

No API server runs here: the schemas are those that one would check with, and its pruning of unknown fields is a refusal.
"""

import lzma
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

KUBERAY = Path(__file__).parent.parent / "clusters" / "kuberay"
DEFINITIONS = Path(__file__).parent.parent.parent / "shared" / "kuberay" / "crds-v1.7.0.tar.xz"


@pytest.fixture(scope="module")
def schemas() -> dict[str, dict[str, Any]]:
    """The schema of each kind."""
    if not DEFINITIONS.exists():
        pytest.skip(f"{DEFINITIONS} is missing: KubeRay's resource definitions")
    found = {}
    with lzma.open(DEFINITIONS) as packed, tarfile.open(fileobj=packed) as archive:
        for member in archive.getmembers():
            content = archive.extractfile(member)
            if content and member.name.endswith(".yaml"):
                spec = yaml.load(content, Loader=yaml.CSafeLoader)["spec"]  # a tenth of the time of the other loader
                [version] = [each for each in spec["versions"] if each["name"] == "v1"]
                found[spec["names"]["kind"]] = closed(version["schema"]["openAPIV3Schema"])
    return found


def closed(schema: Any) -> Any:
    """A schema that refuses the fields which an API server would drop."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(value) for name, value in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    return (
        inner if is_open or not isinstance(schema.get("properties"), dict) else {**inner, "additionalProperties": False}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raycluster", "rayjob", "rayservice"])
def test_kuberay_takes_the_file(name: str, schemas: dict[str, dict[str, Any]]) -> None:
    manifest = yaml.safe_load((KUBERAY / f"{name}.yaml").read_text())
    schema = schemas[manifest["kind"]]
    schema["properties"]["metadata"].pop("additionalProperties", None)
    jsonschema.validate(manifest, schema)
    manifest["spec"]["backofLimit"] = 3
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        jsonschema.validate(manifest, schema)


def test_a_run_that_failed_never_looks_complete() -> None:
    """A second submitter finds the job submitted, follows its log, and ends well (kuberay issue 3211)."""
    spec = yaml.safe_load((KUBERAY / "rayjob.yaml").read_text())["spec"]
    assert spec["submitterConfig"] == {"backoffLimit": 0}
    assert spec.get("submissionMode", "K8sJobMode") == "K8sJobMode"


@dataclass(frozen=True)
class Pod:
    """What a policy sees of a pod."""

    labels: Mapping[str, str]
    namespace: str = "default"
    namespace_labels: Mapping[str, str] = field(default_factory=dict)


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector picks something with these labels; an empty one picks everything."""
    by_operator = {
        "Exists": lambda each: each["key"] in labels,
        "DoesNotExist": lambda each: each["key"] not in labels,
        "In": lambda each: labels.get(each["key"]) in each["values"],
        "NotIn": lambda each: labels.get(each["key"]) not in each["values"],
    }
    equal = all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())
    return equal and all(by_operator[each["operator"]](each) for each in selector.get("matchExpressions", []))


def may_reach(policy: Mapping[str, Any], source: Pod, target: Pod, port: int) -> bool:
    """Whether one pod may open a port of another, by a policy in the namespace of the target."""
    spec = policy["spec"]
    if not selects(spec["podSelector"], target.labels):
        return True
    return any(
        (not rule.get("ports") or port in [each["port"] for each in rule["ports"]])
        and (not rule.get("from") or any(is_peer(each, source, target) for each in rule["from"]))
        for rule in spec["ingress"]
    )


def is_peer(peer: Mapping[str, Any], source: Pod, target: Pod) -> bool:
    if "namespaceSelector" not in peer:
        return source.namespace == target.namespace and selects(peer["podSelector"], source.labels)
    in_namespace = selects(peer["namespaceSelector"], source.namespace_labels)
    return in_namespace and selects(peer.get("podSelector", {}), source.labels)


def of_ray(kind: str) -> Pod:
    return Pod({"ray.io/cluster": "readapt", "ray.io/node-type": kind, "ray.io/is-ray-node": "yes"})


HEAD, WORKER = of_ray("head"), of_ray("worker")
OPERATOR = Pod({"app.kubernetes.io/name": "kuberay-operator"}, "kuberay-system")
SUBMITTER = Pod({"ray.io/originated-from-crd": "RayJob", "ray.io/originated-from-cr-name": "readapt-run"})
SUBMITTER_ELSEWHERE = Pod(SUBMITTER.labels, "team-b")
RAY_ELSEWHERE = Pod(HEAD.labels, "team-b")
CLIENT = Pod({"app": "website"}, "website")
GCS, DASHBOARD, SERVE, AGENT, ANY_WORKER_PORT = 6379, 8265, 8000, 52365, 23_456


@pytest.mark.parametrize(
    ("source", "target", "ports"),
    [
        (WORKER, HEAD, {GCS, DASHBOARD, SERVE, AGENT, ANY_WORKER_PORT}),
        (HEAD, WORKER, {GCS, DASHBOARD, SERVE, AGENT, ANY_WORKER_PORT}),
        (WORKER, WORKER, {GCS, DASHBOARD, SERVE, AGENT, ANY_WORKER_PORT}),
        (OPERATOR, HEAD, {GCS, DASHBOARD, SERVE, AGENT, ANY_WORKER_PORT}),
        (SUBMITTER, HEAD, {DASHBOARD, SERVE}),
        (SUBMITTER, WORKER, {DASHBOARD, SERVE}),
        (SUBMITTER_ELSEWHERE, HEAD, {SERVE}),
        (RAY_ELSEWHERE, HEAD, {SERVE}),
        (CLIENT, HEAD, {SERVE}),
        (CLIENT, WORKER, {SERVE}),
    ],
)
def test_pods_reach_the_ports_that_they_need_and_no_other(source: Pod, target: Pod, ports: set[int]) -> None:
    policy = yaml.safe_load((KUBERAY / "network-policy.yaml").read_text())
    kubernetes_validate.validate(policy, "1.31", strict=True)
    all_ports = {GCS, DASHBOARD, SERVE, AGENT, ANY_WORKER_PORT}
    assert {port for port in all_ports if may_reach(policy, source, target, port)} == ports


def test_a_service_has_a_group_with_the_memory_of_a_large_index() -> None:
    groups = yaml.safe_load((KUBERAY / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    [index] = [group for group in groups if group["groupName"] == "index"]
    resources = index["template"]["spec"]["containers"][0]["resources"]
    assert "nvidia.com/gpu" not in resources["requests"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"] == "224Gi"
    msmarco_flat_gb = 8.85e6 * 4096 * 4 / 1e9
    assert msmarco_flat_gb * 1.25 < 224 * 2**30 / 1e9
