"""One name for an image: what the documents build is what the chart and compose ask for."""

import re
import shlex
from typing import Any

import pytest
import tomllib
import yaml

from tests.deploy.tools import CHART, DOCKER, ROOT, rendered, tool, values_file

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
MODEL = {"model": {"name": "m"}}
VARIANTS = {"cpu": "values-cpu.yaml", "cuda": "values-gpu.yaml"}
README, DOCKER_README = ROOT / "README.md", DOCKER / "README.md"
DOCUMENTS = [
    path for path in ROOT.rglob("*.md") if not path.relative_to(ROOT).parts[0].startswith(".")
]


def commands(text: str, start: str) -> list[list[str]]:
    """The commands of a document's blocks that begin so, as a shell would split them."""
    # Every second part lies between fences; its first line is the language.
    blocks = "".join(part.partition("\n")[2] for part in text.split("```")[1::2])
    lines = blocks.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith(start)]


def after(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def image_of(values: dict[str, Any]) -> str:
    [container] = rendered({**MODEL, **values})["Deployment"]["spec"]["template"]["spec"][
        "containers"
    ]
    return str(container["image"])


def variant_of(build: list[str]) -> str:
    """By the base that it names; the Dockerfile's own is for NVIDIA GPUs."""
    return "cpu" if any("vllm-openai-cpu" in word for word in build) else "cuda"


def test_what_the_readme_builds_it_runs_and_its_chart_pulls() -> None:
    """Break seen: another tag in the command, in values-cpu.yaml, in Chart.yaml."""
    text = README.read_text()
    [build] = commands(text, "docker build")
    built = after(build, "-t")
    [run] = commands(text, "docker run")
    assert built in run
    [install] = commands(text, "helm install")
    file = after(install, "-f")
    assert image_of(yaml.safe_load((ROOT / file).read_text())) == built


def test_both_images_are_those_that_the_chart_pulls() -> None:
    builds = commands(DOCKER_README.read_text(), "docker build")
    built = {variant_of(build): after(build, "-t") for build in builds}
    pulled = {variant: image_of(values_file(file)) for variant, file in VARIANTS.items()}
    assert built == pulled
    assert image_of({}) == pulled["cuda"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_compose_builds_and_runs_the_same_image(variant: str) -> None:
    given = {"MODELS": "/models", "MODEL": "m", "GRAFANA_PASSWORD": "x", "VARIANT": variant}
    config = yaml.safe_load(
        tool("docker-compose", "-f", DOCKER / "compose.yaml", "config", **given)
    )
    assert config["services"]["vllm"]["image"] == image_of(values_file(VARIANTS[variant]))


def test_a_tag_or_a_digest_of_ones_own_goes_before_it() -> None:
    digest = "sha256:" + "0" * 64
    own = {"repository": "here/there", "tag": "mine", "variant": "cpu"}
    assert image_of({"image": own}) == "here/there:mine"
    assert image_of({"image": {**own, "digest": digest}}) == f"here/there@{digest}"


def test_every_place_that_names_a_version_names_the_packages() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (VERSION, VERSION)
    [label] = re.findall(r'image\.version="(.*?)"', (DOCKER / "Dockerfile").read_text())
    assert label == VERSION
    assert f'__version__ = "{VERSION}"' in (ROOT / "orthorank_vllm" / "__init__.py").read_text()
    files = [*DOCUMENTS, DOCKER / "Dockerfile"]
    tags = {
        tag for path in files for tag in re.findall(r"orthorank-vllm:([\w.-]+)", path.read_text())
    }
    assert tags == {f"{VERSION}-{variant}" for variant in VARIANTS}
    # As vLLM's production stack wants it, apart from the repository.
    [apart] = re.findall(
        r"^ +tag: (.*)$", (ROOT / "deploy" / "README.md").read_text(), re.MULTILINE
    )
    assert apart in tags


def test_the_image_says_what_it_is() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    labels = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="(.*?)"', text))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert labels["title"] == project["name"]
    assert labels["licenses"] == project["license"]
    assert labels["source"] == project["urls"]["Source"]
    assert labels["documentation"] == project["urls"]["Documentation"]
    assert {name: labels[name] for name in ("revision", "created", "base.name")} == {
        "revision": "${REVISION}",
        "created": "${CREATED}",
        "base.name": "${BASE}",
    }
