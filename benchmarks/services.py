"""What a cluster needs beside Ray, each on a host of its own: an S3 server (rclone), PostgreSQL, and MLflow, which asks for a password.

Secrets reach programs in files that nobody else may read or in their environment, never as arguments.
"""

import csv
import glob
import io
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hosts import Host, wait_until

S3_PORT, POSTGRES_PORT, MLFLOW_PORT = 9000, 5432, 5000
S3_URL, MLFLOW_URL = f"http://s3:{S3_PORT}", f"http://mlflow:{MLFLOW_PORT}"
BUCKET = "moca"
_READY_S = 60


def _secret() -> str:
    return secrets.token_hex(24)


@dataclass(frozen=True)
class Secrets:
    """All that would let somebody in."""

    ray_token: str = field(default_factory=_secret)
    s3_secret: str = field(default_factory=_secret)
    mlflow_password: str = field(default_factory=_secret)
    postgres_password: str = field(default_factory=_secret)
    mlflow_session_key: str = field(default_factory=_secret)
    s3_key: str = "drill"  # a name, not a secret
    mlflow_user: str = "drill"

    def of_clients(self) -> dict[str, str]:
        """The environment of whoever uses the store and MLflow."""
        return {
            "AWS_ENDPOINT_URL": S3_URL,
            "AWS_ACCESS_KEY_ID": self.s3_key,
            "AWS_SECRET_ACCESS_KEY": self.s3_secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",  # rclone sends a whole object's sum with a part of it
            "MLFLOW_TRACKING_URI": MLFLOW_URL,
            "MLFLOW_TRACKING_USERNAME": self.mlflow_user,
            "MLFLOW_TRACKING_PASSWORD": self.mlflow_password,
        }

    def values(self) -> dict[str, str]:
        return {name: value for name, value in asdict(self).items() if name not in ("s3_key", "mlflow_user")}


def start_s3(host: Host, folder: Path, known: Secrets, log: Path) -> None:
    """Objects are files below `folder`, a bucket is a folder in it."""
    (folder / BUCKET).mkdir(parents=True, exist_ok=True)
    pair = io.StringIO()
    csv.writer(pair, quoting=csv.QUOTE_ALL).writerow([f"{known.s3_key},{known.s3_secret}"])
    command = ["rclone", "serve", "s3", "--addr", f":{S3_PORT}", "--dir-cache-time", "1s", str(folder)]
    host.start(command, log, RCLONE_AUTH_KEY=pair.getvalue().strip(), RCLONE_CONFIG="/dev/null")
    wait_until(lambda: host.fetch(S3_URL)[0] > 0, "S3", _READY_S)


def start_postgres(host: Host, folder: Path, known: Secrets, client: Host, log: Path) -> None:
    """A server that lets in one user, from one host, with a password. It keeps what it has in `folder`."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    if not found:
        raise SystemExit("PostgreSQL's server is needed: apt-get install postgresql")
    as_postgres = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"]  # it refuses root
    if not (folder / "PG_VERSION").exists():
        folder.mkdir(parents=True)
        password = folder.with_name("postgres-password")
        password.write_text(known.postgres_password)
        password.chmod(0o600)
        host.run("chown", "postgres", str(folder), str(password))
        options = ["--username", "mlflow", "--pwfile", str(password), "--auth", "scram-sha-256", "--encoding", "UTF8"]
        host.run(*as_postgres, f"{found[-1]}/initdb", *options, str(folder), within_s=120)
        password.unlink()
    allowed = [("local", "all", "mlflow", ""), ("host", "mlflow", "mlflow", f"{client.address}/32")]
    lines = [" ".join((*line, "scram-sha-256")) + "\n" for line in allowed]
    (folder / "pg_hba.conf").write_text("".join(lines))
    options = ["-c", "listen_addresses=*", "-c", f"port={POSTGRES_PORT}", "-c", f"unix_socket_directories={folder}"]
    host.start([*as_postgres, f"{found[-1]}/postgres", "-D", str(folder), *options], log)
    administrator = {"PGPASSWORD": known.postgres_password, "PGHOST": str(folder), "PGUSER": "mlflow"}
    wait_until((folder / f".s.PGSQL.{POSTGRES_PORT}").exists, "PostgreSQL", _READY_S)
    query = "SELECT count(*) FROM pg_database WHERE datname = 'mlflow'"
    if host.run("psql", "-d", "postgres", "-Atc", query, **administrator).strip() == "0":
        host.run("createdb", "mlflow", **administrator)


def dump(host: Host, folder: Path, known: Secrets) -> str:
    """All that PostgreSQL holds, as SQL."""
    return host.run("pg_dumpall", PGPASSWORD=known.postgres_password, PGHOST=str(folder), PGUSER="mlflow")


def start_mlflow(host: Host, folder: Path, known: Secrets, log: Path) -> None:
    """Books and passwords in PostgreSQL; artifacts do not pass through it, as clients write them to the store."""
    folder.mkdir(parents=True, exist_ok=True)
    database = f"postgresql+psycopg2://mlflow@postgres:{POSTGRES_PORT}/mlflow"  # libpq reads PGPASSWORD
    settings = {
        "database_uri": database,
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        "default_permission": "NO_PERMISSIONS",
        "auth_cache_ttl_seconds": "60",  # or every request is a slow hash
    }
    file = folder / "basic_auth.ini"
    file.write_text("".join(["[mlflow]\n", *(f"{name} = {value}\n" for name, value in settings.items())]))
    command = ["mlflow", "server", "--host", "0.0.0.0", "--port", str(MLFLOW_PORT), "--workers", "1"]
    command += ["--app-name", "basic-auth", "--no-serve-artifacts", "--default-artifact-root", f"s3://{BUCKET}/mlflow"]
    host.start(
        [*command, "--allowed-hosts", f"mlflow:{MLFLOW_PORT},localhost:*"],
        log,
        folder=str(folder),
        MLFLOW_BACKEND_STORE_URI=database,
        MLFLOW_AUTH_CONFIG_PATH=str(file),
        MLFLOW_AUTH_ADMIN_USERNAME=known.mlflow_user,
        MLFLOW_AUTH_ADMIN_PASSWORD=known.mlflow_password,
        PGPASSWORD=known.postgres_password,
        MLFLOW_FLASK_SERVER_SECRET_KEY=known.mlflow_session_key,
        MLFLOW_DISABLE_TELEMETRY="true",
    )
    wait_until(lambda: host.fetch(f"{MLFLOW_URL}/health")[0] > 0, "MLflow", 2 * _READY_S, every_s=1)
