"""The manifest is valid for real API schemas, agrees with itself, and its command starts a machine of a run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCUMENTS = {
    d["kind"]: d for d in yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text(encoding="utf-8"))
}
JOB, POD = DOCUMENTS["Job"]["spec"], DOCUMENTS["Job"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
VARIABLES = {entry["name"]: entry["value"] for entry in CONTAINER["env"]}


@pytest.mark.parametrize("version", ["1.31", "1.33"])
@pytest.mark.parametrize("kind", sorted(DOCUMENTS))
def test_the_api_schema_knows_every_field(kind: str, version: str) -> None:
    kubernetes_validate.validate(DOCUMENTS[kind], version, strict=True)


def test_the_number_of_machines_is_the_same_everywhere() -> None:
    assert JOB["completions"] == JOB["parallelism"] == int(VARIABLES["NNODES"])
    assert JOB["completionMode"] == "Indexed"


def test_each_rank_has_a_gpu_of_its_own() -> None:
    gpus = {CONTAINER["resources"][kind]["nvidia.com/gpu"] for kind in ("requests", "limits")}
    assert gpus == {VARIABLES["NPROC"]}


def test_the_pods_find_the_first_one_by_a_name_that_the_service_gives() -> None:
    service = DOCUMENTS["Service"]
    name = DOCUMENTS["Job"]["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert POD["subdomain"] == service["metadata"]["name"]
    assert VARIABLES["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert {"containerPort": int(VARIABLES["MASTER_PORT"])} in CONTAINER["ports"]


def test_only_the_pods_of_the_job_can_connect_to_each_other() -> None:
    """The Job gives its pods the label, as the headless service uses it."""
    policy = DOCUMENTS["NetworkPolicy"]["spec"]
    own = {"matchLabels": DOCUMENTS["Service"]["spec"]["selector"]}
    assert policy["podSelector"] == own and policy["policyTypes"] == ["Ingress"]
    assert policy["ingress"] == [{"from": [{"podSelector": own}]}]


def test_exit_codes_decide_whether_the_job_goes_on() -> None:
    rules = JOB["podFailurePolicy"]["rules"]
    by_code = {c: r["action"] for r in rules if "onExitCodes" in r for c in r["onExitCodes"]["values"]}
    assert by_code == {2: "FailJob", 4: "FailJob", 3: "Ignore"}
    assert {r["onExitCodes"]["containerName"] for r in rules if "onExitCodes" in r} == {CONTAINER["name"]}
    assert POD["restartPolicy"] == "Never"  # else the API refuses the policy


def test_the_ranks_have_less_time_to_save_than_the_pod() -> None:
    assert POD["terminationGracePeriodSeconds"] > int(VARIABLES["PEFTUNE_GRACE"]) + 30


def test_every_volume_that_is_mounted_is_there() -> None:
    volumes: dict[str, Any] = {volume["name"]: volume for volume in POD["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == set(volumes)
    claim = volumes["outputs"]["persistentVolumeClaim"]["claimName"]
    assert claim == DOCUMENTS["PersistentVolumeClaim"]["metadata"]["name"]


def test_the_command_of_a_pod_starts_the_launcher(
    environment: dict[str, str], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """As a Job of one machine without a GPU: the command, the variables and the exit code are the manifest's."""
    command = [part.replace("/peftune/", f"{ROOT}/") for part in CONTAINER["command"]]
    here = {"NNODES": "1", "NPROC": "1", "PEFTUNE_PYTHON": environment["PEFTUNE_PYTHON"], "JOB_COMPLETION_INDEX": "0"}
    pod = start([*command, "cpu", "recipe", f"out={tmp_path / 'out'}"], **VARIABLES | here)
    _, errors = pod.communicate(timeout=60)
    assert pod.returncode == 0, errors
    assert (tmp_path / "out").read_text() == "adapter of 1 ranks, trained on 0\n"
