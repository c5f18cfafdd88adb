"""Who may use Ray, MLflow, PostgreSQL and the store: tried with the right credentials, which must work, and with none and wrong ones."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hosts import Host
from ray_hosts import DASHBOARD
from services import BUCKET, Secrets

_PAGES = (
    "/",
    "/api/version",
    "/api/jobs/",
    "/nodes?view=summary",
    "/api/v0/nodes",
    "/api/v0/logs",
    "/logs",
    "/timezone",
)
_RAY_DRIVER = "import ray; ray.init('ray://head:10001'); print(ray.get(ray.remote(num_cpus=0)(lambda: 'in').remote()))"
_STORE = f"""
import boto3, botocore, os
signed = "AWS_SECRET_ACCESS_KEY" in os.environ
config = botocore.config.Config(signature_version=None if signed else botocore.UNSIGNED)
print(boto3.client("s3", config=config).list_objects_v2(Bucket="{BUCKET}"))
"""
_MLFLOW = "import mlflow; print(mlflow.MlflowClient().search_experiments())"
_POSTGRES = "import psycopg2; psycopg2.connect(host='postgres', user='mlflow', dbname='mlflow', connect_timeout=10); print('in')"
_NO_TOKEN = r"401|UNAUTHENTICATED|Unauthenticated|AuthenticationError|InvalidAuthToken|ray client connection timeout"


@dataclass(frozen=True)
class Door:
    """What is tried, from where, with which environment it must work, and with which others it must be refused in these words."""

    what: str
    host: Host
    command: list[str]
    right: dict[str, str]
    wrong: dict[str, dict[str, str]]
    refusal: str


@dataclass(frozen=True)
class Tried:
    what: str
    who: str
    good: bool
    said: str


def doors(laptop: Host, mlflow: Host, known: Secrets) -> list[Door]:
    """All that listens. `laptop` has the token in its home folder."""
    no_token = {"nobody": {"RAY_AUTH_MODE": "disabled"}, "a wrong token": {"RAY_AUTH_TOKEN": "0" * 48}}
    clients = known.of_clients()
    nobody = {name: value for name, value in clients.items() if not re.search("KEY|USERNAME|PASSWORD", name)}
    stranger = {"nobody": nobody, "a wrong secret": clients | {"AWS_SECRET_ACCESS_KEY": "0" * 48}}
    visitor = {"nobody": nobody, "a wrong password": clients | {"MLFLOW_TRACKING_PASSWORD": "0" * 48}}
    password = {"PGPASSWORD": known.postgres_password}
    intruder = {"nobody": {}, "a wrong password": {"PGPASSWORD": "0" * 48}}
    return [
        Door("Ray: list jobs", laptop, ["ray", "job", "list"], {}, no_token, _NO_TOKEN),
        Door("Ray: submit a job", laptop, ["ray", "job", "submit", "--", "true"], {}, no_token, _NO_TOKEN),
        Door("Ray: ray.init('ray://...')", laptop, ["python", "-c", _RAY_DRIVER], {}, no_token, _NO_TOKEN),
        Door("Ray: state of the cluster", laptop, ["ray", "status", "--address", "head:6379"], {}, no_token, _NO_TOKEN),
        Door(
            "S3: list", laptop, ["python", "-c", _STORE], clients, stranger, "ClientError.*(Signature|Algorithm|Denied)"
        ),
        Door("MLflow: list", laptop, ["python", "-c", _MLFLOW], clients, visitor, "401"),
        Door("PostgreSQL", mlflow, ["python", "-c", _POSTGRES], password, intruder, "password"),
    ]


def tried(door: Door) -> Iterator[Tried]:
    for who, environment in {"the right one": door.right, **door.wrong}.items():
        try:
            said, inside = door.host.run(*door.command, within_s=120, **environment), True
        except RuntimeError as error:
            said, inside = str(error), False
        good = inside if environment is door.right else not inside and bool(re.search(door.refusal, said))
        yield Tried(door.what, who, good, said.strip()[-300:])


def open_pages(laptop: Host, hosts: list[Host]) -> dict[str, int]:
    """{address: status} of what a cluster's ports and its dashboard's pages answer with 200 to a browser without the token."""
    addresses = [f"{DASHBOARD}{path}" for path in _PAGES]
    for host in hosts:
        ports = sorted({int(port) for port in re.findall(r":(\d+) +\S+:\*", host.run("ss", "-Hltn"))})
        addresses += [f"http://{host.name}:{port}{path}" for port in ports for path in ("/", "/metrics")]
    return {address: status for address in addresses if (status := laptop.fetch(address)[0]) == 200}
