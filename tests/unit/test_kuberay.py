"""The KubeRay manifests against the schemas of their resources, Serve's own schema, and themselves."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from rayrm.config import ServeConfig
from rayrm.runfile import read_run

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
GROUP = _object(["fsGroup"], fsGroup={"type": "integer"})
TEMPLATE = _object(
    ["spec"],
    spec=_object(
        ["containers", "securityContext"],
        containers=_list(CONTAINER),
        volumes=_list(VOLUME),
        securityContext=GROUP,
    ),
)
RAY_CLUSTER = _object(
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
)
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
        rayClusterConfig=RAY_CLUSTER,
    ),
)
# The same of RayJob: ray-operator/apis/ray/v1/rayjob_types.go at 0057210.
RAY_JOB = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=_object(["name"], name=TEXT),
    spec=_object(
        ["entrypoint", "rayClusterSpec"],
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        backoffLimit=COUNT,
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        suspend={"type": "boolean"},
        rayClusterSpec=RAY_CLUSTER,
    ),
)


@pytest.fixture
def manifest() -> dict[str, Any]:
    return dict(yaml.safe_load((JOBS / "kuberay" / "rayservice.yaml").read_text()))


@pytest.fixture
def job() -> dict[str, Any]:
    return dict(yaml.safe_load((JOBS / "kuberay" / "rayjob.yaml").read_text()))


def containers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    spec = manifest["spec"]
    cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
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


def test_the_job_is_a_ray_job(job: dict[str, Any]) -> None:
    jsonschema.validate(job, RAY_JOB)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda j: j["spec"].update(rayClusterConfig=j["spec"].pop("rayClusterSpec")),
        lambda j: j["spec"].update(runtimeEnv={"env_vars": {}}),
        lambda j: j["spec"].update(backoffLimit="3"),
        lambda j: j["spec"].update(entrypoint=["rayrm", "train"]),
        lambda j: j["spec"].update(ttlSecondsAfterFinished=-1),
        lambda j: containers(j)[0]["env"][0].update(value=120),
    ],
)
def test_the_schema_of_a_job_refuses_what_the_operator_would(job: dict[str, Any], spoil: Any) -> None:
    spoil(job)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, RAY_JOB)


def test_the_job_s_pods_have_what_its_run_asks_for(job: dict[str, Any]) -> None:
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    command, verb, file, *words = shlex.split(spec["entrypoint"])
    assert (command, verb) == ("rayrm", "train")
    run = read_run(JOBS / "first.toml", words)
    [workers] = cluster["workerGroupSpecs"]
    [worker] = workers["template"]["spec"]["containers"]
    each = (run.cluster.resources_per_worker or {})["CPU"]
    cpus = int(worker["resources"]["limits"]["cpu"])
    # All ranks have a place, none across two pods, and Ray Data has CPUs beside them to read with.
    assert run.cluster.num_workers <= workers["replicas"] * (cpus // each)
    assert run.cluster.num_workers * each < workers["replicas"] * cpus
    assert workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"]
    # A retry on a new cluster finds the run where all pods see it.
    assert spec["backoffLimit"] > 0
    for container in containers(job):
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert all(any(path.startswith(f"{at}/") for at in mounts) for path in (file, run.reward.output_dir))
        assert container["image"] == containers(job)[0]["image"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    assert set(environment) <= {"env_vars", "working_dir", "py_modules", "pip", "uv", "excludes"}
    assert all(isinstance(value, str) for value in environment["env_vars"].values())
    assert int(environment["env_vars"]["OMP_NUM_THREADS"]) == each


def test_both_manifests_are_of_the_ray_that_is_tested(manifest: dict[str, Any], job: dict[str, Any]) -> None:
    [pinned] = re.findall(r"^ray==(.*)$", (JOBS.parent / "constraints.txt").read_text(), re.MULTILINE)
    assert manifest["spec"]["rayClusterConfig"]["rayVersion"] == pinned
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned
