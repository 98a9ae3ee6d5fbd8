"""The manifests of deploy/ and the places that name the image's version."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def version() -> str:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def test_the_config_maps_are_those_that_the_controller_reads() -> None:
    """Name, namespace and keys as in Kube-OVN's guide; only the image is another."""
    ours = {document["metadata"]["name"]: document for document in documents(DEPLOY / "configmaps.yaml")}
    guide = documents(ROOT / "examples/seeds/002-05-enable.yaml")
    assert len(guide) == len(ours)
    for document in guide:
        other = ours[document["metadata"]["name"]]
        assert other["metadata"] == document["metadata"]
        assert (other["kind"], other["apiVersion"]) == (document["kind"], document["apiVersion"])
        assert other["data"].keys() == document["data"].keys()
    assert ours["ovn-vpc-nat-gw-config"]["data"] == {"enable-vpc-nat-gw": "true"}


def test_one_version_everywhere() -> None:
    tag = f"vpc-nat-gateway:{version()}"
    images = [document["data"].get("image", tag) for document in documents(DEPLOY / "configmaps.yaml")]
    images += [document["data"]["image"] for document in documents(DEPLOY / "swap-image.yaml")]
    assert all(image.endswith(tag) for image in images), images
    assert f"\nARG VERSION={version()}\n" in (ROOT / "image/Dockerfile").read_text()
    assert tag in (ROOT / "docs/install.md").read_text()


def test_the_kustomization_names_what_is_there() -> None:
    (kustomization,) = documents(DEPLOY / "kustomization.yaml")
    assert all((DEPLOY / name).is_file() for name in kustomization["resources"])


def test_the_ports_of_the_pod_monitor() -> None:
    (monitor,) = documents(DEPLOY / "podmonitor.yaml")
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["bfdd-metrics", "metrics"]


def test_the_image_is_built_of_everything_that_is_packaged() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["packages"]
    dockerfile = (ROOT / "image/Dockerfile").read_text()
    context = (ROOT / ".dockerignore").read_text().splitlines()
    for package in {package.partition(".")[0] for package in packages}:
        assert f"\nCOPY {package} {package}/\n" in dockerfile
        assert f"!{package}" in context
