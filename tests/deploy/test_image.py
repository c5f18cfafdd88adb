"""The Dockerfile and the tree that it is built from. No image is built here."""

import re

from tests.deploy.manifests import DEPLOY, REPOSITORY

LINES = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "").splitlines()
STAGE = re.compile(r"^FROM (\S+) AS (\S+)$")


def stages() -> dict[str, tuple[str, list[str]]]:
    """{stage: (the one it starts from, its instructions)}"""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in LINES:
        if match := STAGE.match(line):
            found[match[2]] = (match[1], [])
        elif found and line and not line.startswith("#"):
            list(found.values())[-1][1].append(line)
    return found


def test_the_code_lies_where_the_entrypoint_looks() -> None:
    _, instructions = stages()["moca"]
    copied = [line.split()[1:] for line in instructions if line.startswith("COPY") and "--from" not in line]
    assert copied == [[name, name] for name in ("moca_core", "cluster", "pipelines")]
    assert "WORKDIR /opt/moca" in instructions
    assert any(
        line.startswith("RUN echo /opt/moca > ") and line.endswith("/site-packages/moca.pth") for line in instructions
    )
    assert list(stages())[-1] == "moca"  # what is built when no target is named


def test_what_is_copied_is_sent_to_the_builder_and_nothing_else() -> None:
    sent = (REPOSITORY / ".dockerignore").read_text().splitlines()
    needed = {w for line in LINES if line.startswith("COPY") and "--from" not in line for w in line.split()[1:-1]}
    assert {line.removeprefix("!") for line in sent if line.startswith("!")} == needed
    assert sent.index("*") < sent.index("!cluster") < sent.index("cluster/deploy/secrets/*.env")  # the last word counts


def test_the_base_is_pinned_and_the_python_that_is_tested() -> None:
    (base,) = (line.removeprefix("ARG PYTHON=") for line in LINES if line.startswith("ARG PYTHON="))
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    assert {name: start for name, (start, _) in stages().items() if start != "base"} == {"base": "${PYTHON}"}
    folder = next(line for line in stages()["moca"][1] if "site-packages" in line)
    assert "/lib/python3.11/" in folder


def test_images_run_as_nobody_in_particular_and_carry_no_tools_to_build_with() -> None:
    for name in ("moca", "mlflow"):
        _, instructions = stages()[name]
        assert [line for line in instructions if line.startswith("USER")] == ["USER 10001"]
        after = instructions[instructions.index("USER 10001") :]
        assert not [line for line in after if line.startswith(("RUN", "COPY"))]
        assert not [line for line in instructions if "pip install" in line or "g++" in line]
    assert 'ARG COMPILER=""' in stages()["moca"][1]


def test_what_others_look_for_is_in_the_image() -> None:
    """wget: KubeRay's probes. libibverbs: NCCL, which takes sockets instead of RDMA without a word where it is missing."""
    (install,) = (line for line in stages()["moca"][1] if "apt-get install" in line)
    assert {"wget", "libibverbs1", "ibverbs-providers"} <= set(install.split())


def test_the_mlflow_server_is_as_pinned_as_the_client() -> None:
    (install,) = (line for line in stages()["mlflow-installed"][1] if "pip install" in line)
    pinned = {
        line.split("==")[0].lower()
        for line in (REPOSITORY / "requirements.txt").read_text().splitlines()
        if "==" in line
    }
    assert "-c requirements.txt" in install
    assert {"mlflow", "flask-wtf", "psycopg2-binary", "boto3"} <= pinned
    for package in install.split("-c requirements.txt")[1].split():
        assert package.removesuffix("[auth]") in pinned, package
