"""The Kubernetes manifests: the schemas of Kubernetes accept them, and they agree with the product."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from tests.deploy.manifests import KUBERNETES, Document, container, documents, of_kind, pods, references, resources
from tests.deploy.test_files import FOREIGN_VARIABLES, PAGES, PROCESSES, PROCFILE, SYSTEMD, compose, values
from tests.servers import missing
from worker.cli.commands import group
from worker.configuration.api_keys import parse_keys
from worker.settings import Settings, load

OLDEST_VERSION, NEWEST_VERSION = "1.30", kubernetes_validate.latest_version()
WITH_STORAGE = {"worker", "downloads", "admin"}  # processes that store, prune or show outputs
LABEL = "app.kubernetes.io/component"
SECONDS = {"": 1, "s": 1, "m": 60, "min": 60}


def check(document: Document, version: str) -> None:
    """Check a resource against the schema of a version of Kubernetes. Unknown fields are errors."""
    kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", [OLDEST_VERSION, NEWEST_VERSION])
def test_the_schemas_of_kubernetes_accept_every_resource(version: str) -> None:
    checked = [*resources(), *documents(KUBERNETES / "volume" / "claim.yaml")]
    for document in checked:
        check(document, version)

    assert len(checked) > 10


def test_a_mistyped_field_is_found() -> None:
    document = of_kind("Deployment")["worker"]
    document["spec"]["template"]["spec"]["terminationGracePeriod"] = 40

    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        check(document, NEWEST_VERSION)


def test_every_manifest_is_used() -> None:
    for folder in (KUBERNETES / "s3", KUBERNETES / "volume"):
        (kustomization,) = documents(folder / "kustomization.yaml")
        listed = {name for name in kustomization["resources"] if name.endswith(".yaml")}

        unlisted = {path.name for path in folder.glob("*.yaml")} - listed
        assert unlisted <= {"kustomization.yaml", "secrets.example.yaml"}


def test_each_process_has_a_deployment_with_its_command() -> None:
    commands = {name: container(pod)["command"] for name, pod in pods().items()}

    assert shlex.join(commands.pop("migrate")) == PROCFILE["release"]
    assert {name: " ".join(words) for name, words in commands.items()} == {
        name: PROCFILE[name] for name in PROCESSES
    } | PAGES
    for command in PAGES.values():
        _, name, *arguments = command.split()
        group.commands[name].make_context(name, arguments)


def test_only_the_pods_that_poll_get_the_keys_and_only_the_pages_get_their_passwords() -> None:
    names = {
        secret: {name for name, pod in pods().items() if ("Secret", secret) in references(pod)}
        for secret in ("fetch-worker", "fetch-worker-keys", "fetch-worker-pages")
    }

    assert names == {
        "fetch-worker": set(pods()),
        "fetch-worker-keys": {"worker"},
        "fetch-worker-pages": {"flower", "admin"},
    }


@pytest.mark.parametrize("name", pods())
def test_a_pod_is_restricted_and_needs_neither_a_certain_user_nor_a_home(name: str) -> None:
    pod = pods()[name]
    process = container(pod)

    assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"]) == (False, False)
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert process["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = {mount["name"]: mount["mountPath"] for mount in process["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"state": "/var/lib/fetch-worker", "tmp": "/tmp"}
    assert all({"name": volume, "emptyDir": {}} in pod["volumes"] for volume in writable)
    assert of_kind("ConfigMap")["fetch-worker"]["data"]["STATE_DIRECTORY"] == writable["state"]


@pytest.mark.parametrize("name", pods())
def test_a_pod_has_requests_and_a_limit_of_memory_and_is_never_throttled(name: str) -> None:
    resources = container(pods()[name])["resources"]

    assert resources["requests"].keys() >= {"cpu", "memory"}
    assert resources["limits"].keys() == {"memory"}


def test_no_probe_depends_on_a_server_and_processes_without_a_port_end_themselves() -> None:
    """`doctor --liveness` asks the database, so as a probe it would restart every pod while the database is away."""
    for name, pod in pods().items():
        process = container(pod)
        probes = {field: probe for field, probe in process.items() if field.endswith("Probe")}
        if name in ("flower", *PAGES):
            assert probes.keys() == {"livenessProbe", "readinessProbe"}
            assert all(
                set(probe) & {"httpGet", "exec", "tcpSocket", "grpc"} == {"httpGet"} for probe in probes.values()
            )
        else:
            assert probes == {}
            assert ({"name": "END_WHEN_STALLED", "value": "on"} in process.get("env", ())) == (
                name in ("worker", "downloads")
            )


@pytest.mark.parametrize("name", [*PROCESSES, *PAGES])
def test_a_process_has_the_same_time_to_stop_everywhere(name: str) -> None:
    unit = next(path for path in SYSTEMD.glob(f"fetch-worker-{name}*.service"))
    times = [
        values(unit, "TimeoutStopSec")[0],
        compose()["services"][name]["stop_grace_period"],
        str(pods()[name]["terminationGracePeriodSeconds"]),
    ]

    seconds = {int(number) * SECONDS[unit] for number, unit in (_parts(time) for time in times)}
    assert len(seconds) == 1, times


def _parts(time: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\d+)([a-z]*)", time)
    assert match is not None, time
    return match[1], match[2]


def test_selectors_find_their_pods() -> None:
    workloads = of_kind("Deployment") | of_kind("Job")
    labels = {name: workload["spec"]["template"]["metadata"]["labels"] for name, workload in workloads.items()}

    assert {name: found[LABEL] for name, found in labels.items()} == {name: name for name in labels}
    for kind in ("Deployment", "PodDisruptionBudget"):
        for name, resource in of_kind(kind).items():
            assert resource["spec"]["selector"]["matchLabels"] == labels[name]
    for name, service in of_kind("Service").items():
        assert service["spec"]["selector"] == labels[name]
        (port,), (exposed,) = container(pods()[name])["ports"], service["spec"]["ports"]
        assert (exposed["targetPort"], exposed["port"]) == (port["name"], port["containerPort"])
    for name, pod in pods().items():
        for constraint in pod.get("topologySpreadConstraints", ()):
            assert constraint["labelSelector"]["matchLabels"] == labels[name]


def test_every_resource_that_a_pod_needs_exists() -> None:
    existing = {(document["kind"], document["metadata"]["name"]) for document in resources()}

    assert {reference for pod in pods().values() for reference in references(pod)} <= existing


def test_every_variable_is_a_setting_or_belongs_to_another_program() -> None:
    names = {variable["name"] for pod in pods().values() for variable in container(pod).get("env", ())}
    names |= of_kind("ConfigMap")["fetch-worker"]["data"].keys()
    for secret in of_kind("Secret").values():
        names |= secret["stringData"].keys() - {"keys.json"}

    assert {"DATABASE_URL", "REDIS_URL", "STORAGE_URL", "WEBHOOK_SECRET", "ADMIN_PASSWORD"} <= names
    assert {
        name for name in names if name.lower() not in Settings.model_fields and not FOREIGN_VARIABLES.fullmatch(name)
    } == set()


def test_the_example_secrets_can_be_used_unchanged_and_hold_no_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = {name: secret["stringData"] for name, secret in of_kind("Secret").items()}
    assert set(parse_keys(data["keys"].pop("keys.json")).values()) == {""}
    assert set((data["keys"] | data["pages"]).values()) == {""}
    for variables in (of_kind("ConfigMap")["fetch-worker"]["data"], *data.values()):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))

    settings = load("flower", "admin", "metrics", "downloads")

    assert settings.secret_texts == ()
    assert (settings.flower_basic_auth, settings.admin_password) == (None, None)


def test_a_filled_in_secret_is_neither_committed_nor_put_into_the_image() -> None:
    root = KUBERNETES.parents[2]
    for name in (".gitignore", ".dockerignore"):
        assert "worker/deploy/kubernetes/**/secrets.yaml" in (root / name).read_text().splitlines()


@pytest.fixture(scope="module")
def built() -> dict[str, list[Document]]:
    """The resources of each folder, as `kubectl apply --kustomize` sends them."""
    kubectl = shutil.which("kubectl") or missing("kubectl")
    texts = {
        name: subprocess.run(
            [kubectl, "kustomize", KUBERNETES / name], capture_output=True, text=True, check=True
        ).stdout
        for name in ("s3", "volume")
    }
    return {name: list(YAML(typ="safe").load_all(text)) for name, text in texts.items()}


def _deployments(built: list[Document]) -> dict[str, Any]:
    return {
        document["metadata"]["name"].removeprefix("fetch-worker-"): document["spec"]["template"]["spec"]
        for document in built
        if document["kind"] == "Deployment"
    }


@pytest.mark.server
def test_kubectl_builds_both_kinds_of_storage(built: dict[str, list[Document]]) -> None:
    for folder in built.values():
        for document in folder:
            check(document, NEWEST_VERSION)

    settings = {
        name: next(document["data"]["STORAGE_URL"] for document in folder if document["kind"] == "ConfigMap")
        for name, folder in built.items()
    }
    assert settings == {"s3": "s3://bucket/prefix", "volume": "file:/srv/outputs"}
    assert len(built["volume"]) == len(built["s3"]) + 1


@pytest.mark.server
def test_the_pods_that_need_the_outputs_mount_their_volume_and_may_write_to_it(
    built: dict[str, list[Document]],
) -> None:
    deployments = _deployments(built["volume"])
    mounted = {name for name, pod in deployments.items() if "outputs" in str(pod["volumes"])}

    assert mounted == WITH_STORAGE
    for name in mounted:
        assert deployments[name]["securityContext"]["fsGroup"] == 10001
        assert {"name": "outputs", "mountPath": "/srv/outputs"} in container(deployments[name])["volumeMounts"]


@pytest.mark.server
def test_all_pods_run_the_same_image(built: dict[str, list[Document]]) -> None:
    images = {container(pod)["image"] for pod in _deployments(built["s3"]).values()}
    (job,) = (document for document in built["s3"] if document["kind"] == "Job")

    assert images == {container(job["spec"]["template"]["spec"])["image"]}
    assert images == {"registry.example.com/fetch-worker:0.1.0"}
