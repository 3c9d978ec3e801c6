"""The KubeRay manifest against the schema of its resource, Serve's own schema, and itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from rayrm.config import ServeConfig

JOBS = Path(__file__).resolve().parents[2] / "jobs"


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
# Kubernetes' quantities: whole or decimal numbers with a suffix, as strings.
QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[kMGT]|[KMGT]i)?$"},
}
CONTAINER = _object(
    ["name", "image", "resources"],
    name={"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
    image=TEXT,
    ports=_list(_object(["containerPort"], containerPort=PORT, name=TEXT)),
    env=_list(
        _object(
            ["name"],
            name=TEXT,
            value={"type": "string"},
            valueFrom=_object(["secretKeyRef"], secretKeyRef=_object(["name", "key"], name=TEXT, key=TEXT)),
        )
    ),
    resources=_object(["requests", "limits"], requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=_list(_object(["name", "mountPath"], name=TEXT, mountPath=TEXT)),
)
VOLUME = _object(
    ["name"], name=TEXT, persistentVolumeClaim=_object(["claimName"], claimName=TEXT, readOnly={})
)
TEMPLATE = _object(["spec"], spec=_object(["containers"], containers=_list(CONTAINER), volumes=_list(VOLUME)))
# The part of RayService (ray.io/v1) that the manifest has: names, types and what is required are those of
# KubeRay's CustomResourceDefinition, helm-chart/kuberay-operator/crds/ray.io_rayservices.yaml at feeaf72.
RAY_SERVICE = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=_object(["name"], name=TEXT),
    spec=_object(
        ["serveConfigV2", "rayClusterConfig"],
        serveConfigV2=TEXT,
        rayClusterConfig=_object(
            ["headGroupSpec"],
            rayVersion=TEXT,
            authOptions=_object([], mode={"enum": ["disabled", "token"]}, secretName=TEXT),
            enableInTreeAutoscaling={"type": "boolean"},
            headGroupSpec=_object(["template"], rayStartParams=TEXTS, template=TEMPLATE),
            workerGroupSpecs=_list(
                _object(
                    ["groupName", "minReplicas", "maxReplicas", "template"],
                    groupName=TEXT,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    rayStartParams=TEXTS,
                    template=TEMPLATE,
                )
            ),
        ),
    ),
)


@pytest.fixture
def manifest() -> dict[str, Any]:
    return dict(yaml.safe_load((JOBS / "kuberay" / "rayservice.yaml").read_text()))


def containers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_the_manifest_is_a_ray_service(manifest: dict[str, Any]) -> None:
    jsonschema.validate(manifest, RAY_SERVICE)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m["spec"].update(serveConfig="applications: []"),
        lambda m: m["spec"].pop("rayClusterConfig"),
        lambda m: m["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].update(replicas="2"),
        lambda m: m["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].pop("groupName"),
        lambda m: m["spec"]["rayClusterConfig"]["authOptions"].update(mode="basic"),
        lambda m: containers(m)[0]["resources"]["limits"].update(memory="4 gigabytes"),
        lambda m: containers(m)[0]["env"][0].update(valueFrom={"secretRef": {"name": "rayrm-http"}}),
    ],
)
def test_the_schema_refuses_what_the_operator_would(manifest: dict[str, Any], spoil: Any) -> None:
    spoiled = copy.deepcopy(manifest)
    spoil(spoiled)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spoiled, RAY_SERVICE)


@pytest.mark.parametrize("place", ["serve.yaml", "kuberay/rayservice.yaml"])
def test_the_serve_config_is_one_that_serve_and_the_service_take(place: str) -> None:
    found = yaml.safe_load((JOBS / place).read_text())
    config = yaml.safe_load(found["spec"]["serveConfigV2"]) if "spec" in found else found
    checked = ServeDeploySchema.model_validate(config)
    [application] = checked.applications
    assert application.import_path == "rayrm.serve.deployment:app"
    assert {one.name for one in application.deployments} <= {"RewardReplica", "HttpGateway"}
    ServeConfig(**{name: value for name, value in application.args.items() if name != "model"})


def test_the_pods_have_what_the_serve_config_asks_for(manifest: dict[str, Any]) -> None:
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    [application] = config["applications"]
    cluster = manifest["spec"]["rayClusterConfig"]
    [workers] = cluster["workerGroupSpecs"]
    [replicas] = [one for one in application["deployments"] if one["name"] == "RewardReplica"]
    [worker] = workers["template"]["spec"]["containers"]
    # Every replica has a place in the workers that are there to begin with.
    each = int(worker["resources"]["limits"]["cpu"]) // replicas["ray_actor_options"]["num_cpus"]
    # Without an autoscaler the operator keeps `replicas` workers, and other bounds would mean nothing.
    assert cluster.get("enableInTreeAutoscaling", False) is False
    assert workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"]
    assert replicas["num_replicas"] <= each * workers["replicas"]
    # Who reaches the dashboard can run anything: it asks for Ray's token, and no port is open for nothing.
    assert cluster["authOptions"]["mode"] == "token"
    ports = {port["name"] for port in containers(manifest)[0]["ports"]}
    assert ports == {"gcs-server", "dashboard", "serve"}
    # HTTP is answered on a port that the pod opens, with a token that every pod knows, as it is bound to all
    # addresses; the application is built, and the gateway stands, wherever Ray puts them.
    assert config["http_options"]["host"] == "0.0.0.0"
    head = containers(manifest)[0]
    assert config["http_options"]["port"] in [port["containerPort"] for port in head["ports"]]
    for container in containers(manifest):
        assert [one["name"] for one in container["env"]] == [ServeConfig().http_token_env]
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert any(application["args"]["model"].startswith(path + "/") for path in mounts)
        assert container["image"] == head["image"]
