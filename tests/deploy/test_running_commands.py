"""The lines of the manual that run a command in a deployment name containers, pods, units and options that exist."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.manifests import container, of_kind, pods
from tests.deploy.test_files import INSTALLED, SYSTEMD, compose, values
from tests.docs.manual import PAGES, blocks
from tests.servers import missing
from worker.cli.commands import group

LINES = [
    line.partition("  #")[0].strip()
    for page in PAGES.values()
    for block in blocks("sh", page)
    for line in block.replace("\\\n", " ").splitlines()
]
IN_COMPOSE = [line for line in LINES if line.startswith("docker compose ") and " fetch-worker " in line]
IN_KUBERNETES = [line for line in LINES if line.startswith("kubectl exec ")]
(BY_SYSTEMD,) = (shlex.split(line) for line in LINES if line.startswith("systemd-run "))


@pytest.mark.parametrize("line", IN_COMPOSE)
def test_a_command_in_compose_names_a_service_and_a_command(line: str) -> None:
    match = re.fullmatch(r"docker compose (?:exec|run --rm) (\S+) fetch-worker (\S+)", line)

    assert match is not None, line
    assert compose()["services"][match[1]]["image"] == "fetch-worker"
    assert match[2] in group.commands


@pytest.mark.parametrize("line", IN_KUBERNETES)
def test_a_command_in_kubernetes_names_a_deployment_and_a_command(line: str) -> None:
    match = re.fullmatch(r"kubectl exec (?:-it )?deploy/fetch-worker-(\S+) -- fetch-worker (\S+)", line)

    assert match is not None, line
    assert match[1] in of_kind("Deployment")
    assert match[2] in group.commands


def test_every_deployment_and_service_that_the_manual_names_exists() -> None:
    names = re.findall(r"\b(deployment|deploy|service)/fetch-worker-([a-z]+)(?: (\d+))?", "\n".join(PAGES.values()))

    assert names
    for kind, name, port in names:
        assert name in of_kind("Service" if kind == "service" else "Deployment")
        assert not port or int(port) == container(pods()[name])["ports"][0]["containerPort"]


@pytest.mark.server
def test_systemd_knows_the_options_and_properties_of_the_command(tmp_path: Path) -> None:
    if shutil.which("systemd-run") is None:
        missing("systemd-run")
    options = {option.partition("=")[0] for option in BY_SYSTEMD if option.startswith("--")}
    explained = subprocess.run(["systemd-run", "--help"], capture_output=True, text=True, check=True).stdout
    properties = [option.partition("=")[2] for option in BY_SYSTEMD if option.startswith("--property=")]
    unit = tmp_path / "command.service"
    unit.write_text("\n".join(["[Service]", *properties, "ExecStart=/bin/true"]))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert {option for option in options if not re.search(rf"{option}\b", explained)} == set()
    assert (verified.returncode, verified.stderr) == (0, "")


def test_the_command_runs_as_the_units_do() -> None:
    common = SYSTEMD / "fetch-worker-.service.d" / "common.conf"
    line = " ".join(BY_SYSTEMD)

    assert f"--uid={values(common, 'User')[0]}" in line
    assert f"--working-directory={values(common, 'WorkingDirectory')[0]}" in line
    for name in ("EnvironmentFile", "StateDirectory"):
        assert f"--property={name}={values(common, name)[0]}" in line
    assert f"{INSTALLED}fetch-worker status" in line
