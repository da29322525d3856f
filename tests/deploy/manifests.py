"""The Kubernetes manifests as tests read them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

KUBERNETES = Path(__file__).resolve().parents[2] / "worker" / "deploy" / "kubernetes"
Document = dict[str, Any]


def documents(path: Path) -> list[Document]:
    """Return the documents of a YAML file."""
    return list(YAML(typ="safe").load_all(path))


def resources() -> list[Document]:
    """Return every resource of `kubernetes/s3`: those that its kustomization lists, and the example secrets."""
    folder = KUBERNETES / "s3"
    (kustomization,) = documents(folder / "kustomization.yaml")
    names = [*kustomization["resources"], "secrets.example.yaml"]
    return [document for name in names for document in documents(folder / name)]


def of_kind(kind: str) -> dict[str, Document]:
    """Return the resources of a kind by name, without the common part of their names."""
    return {
        document["metadata"]["name"].removeprefix("fetch-worker-"): document
        for document in resources()
        if document["kind"] == kind
    }


def pods() -> dict[str, Document]:
    """Return the specification of the pods of each Deployment and Job."""
    workloads = of_kind("Deployment") | of_kind("Job")
    return {name: workload["spec"]["template"]["spec"] for name, workload in workloads.items()}


def container(pod: Document) -> Document:
    """Return the only container of a pod."""
    (only,) = pod["containers"]
    return dict(only)


def references(pod: Document) -> Iterator[tuple[str, str]]:
    """Return kind and name of each resource that a pod needs."""
    for source in container(pod)["envFrom"]:
        for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            if field in source:
                yield kind, source[field]["name"]
    for variable in container(pod).get("env", ()):
        if "valueFrom" in variable:
            yield "Secret", variable["valueFrom"]["secretKeyRef"]["name"]
    for volume in pod["volumes"]:
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
