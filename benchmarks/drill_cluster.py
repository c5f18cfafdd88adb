"""Everything that the drill needs, up: S3, PostgreSQL and MLflow, a head, nodes for data and for training, a laptop."""

from pathlib import Path

from hosts import Host, Network
from ray_hosts import User, start_ray
from secret_search import arguments, exposed, files
from services import Secrets, dump, start_mlflow, start_postgres, start_s3

DATA, TRAINING = ("data1", "data2"), ("train1", "train2")
CPUS = 4  # of a node: logical


class Cluster:
    """All hosts; what they leave lies in `folder`. Nodes without --labels moca.role=training are for data.

    `variables` are in the environment of Ray on all of them.
    """

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.folder, self._variables = folder, variables
        self.known = known = Secrets()
        self.network = Network(folder / "hosts")
        shared = [self.network.add(name, private=False) for name in ("s3", "postgres", "mlflow", "laptop")]
        self.s3, self.postgres, self.mlflow, self.laptop = shared
        start_s3(self.s3, folder / "s3", known, self.log("s3"))
        start_postgres(self.postgres, folder / "postgres", known, self.mlflow, self.log("postgres"))
        start_mlflow(self.mlflow, folder / "mlflow", known, self.log("mlflow"))
        self.head = self.network.add("head")
        self.head.environment |= variables
        start_ray(self.head, known, self.log("head"))
        self.user = User(self.laptop, known)
        for name in (*DATA, *TRAINING):
            self.add(name)
        self.user.wait_for_nodes(1 + len(DATA) + len(TRAINING))

    def add(self, name: str) -> Host:
        host = self.network.add(name)
        host.environment |= self._variables
        start_ray(host, self.known, self.log(name), self.head, CPUS, training=name.startswith("train"))
        return host

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def exposed(self, secrets: dict[str, str]) -> tuple[list[str], int]:
        """Where these secrets can be read, and how many places were looked at: all that is kept but PostgreSQL's own files."""
        mine = self.folder.glob("hosts/*/tmp/home/.ray/auth_token")
        status, jobs = self.user.ask("/api/jobs/")
        assert status == 200, jobs
        database = dump(self.postgres, self.folder / "postgres", self.known)
        places = [("PostgreSQL", database.encode()), ("Ray's list of jobs", jobs.encode())]
        places += arguments(self.network.hosts.values())
        kept = (file for file in files(self.folder, mine) if not file[0].startswith("postgres/"))
        return exposed(secrets, (*places, *kept))

    def close(self) -> None:
        self.network.close()
