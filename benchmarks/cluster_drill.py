"""The demo as a job on a Ray cluster of five hosts, whose machines and links fail; and who may see what.

    python benchmarks/cluster_drill.py [--folder FOLDER] [--phases NAME,...] [--set STAGE.KEY=VALUE] [--ray NAME=VALUE]

A head without CPUs, two nodes for data, two for training, an S3 server, PostgreSQL, MLflow and a laptop that submits are hosts of a
network of their own on this machine (hosts.py: Linux, root). Every phase starts all of it anew:

refusals     without credentials or with wrong ones nobody gets into Ray, MLflow, PostgreSQL or the store
leak         what becomes of a secret that a job is given by --runtime-env-json
undisturbed  the job, left alone
disturbed    a node for data is lost; one for training, and replaced; the other one's link is cut for 30 s: the same scores
resubmitted  the driver is killed in fine-tuning; submitted again, the job goes on where it stopped: the same scores

After a job, logs, records, PostgreSQL's dump, Ray's list of jobs and the arguments of all processes are searched for every secret.
With a `--folder` the same command goes on behind the last finished phase. Exit code 1 if anything was not as it should be.
"""

import argparse
import json
import re
import secrets
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

from drill_cluster import DATA, TRAINING, Cluster
from hosts import Host
from ray_hosts import DASHBOARD
from refusals import doors, open_pages, tried
from watched_command import STAGES
from watched_job import Blow, Ended, results, run_job, same

CUT_S = 30.0
REPLACED_AFTER_S = 20.0
LONGEST_S = 3600.0
WORKER_CPUS = 3  # of a node's four: so that a training node holds one worker
KILL_AT = 150  # of finetune's steps


def refusals(cluster: Cluster, settings: list[str], folder: Path) -> dict:
    found = [one for door in doors(cluster.laptop, cluster.mlflow, cluster.known) for one in tried(door)]
    for one in found:
        print(f"  {'ok  ' if one.good else 'FAIL'} {one.what:<28} {one.who:<18} {one.said.splitlines()[-1][-110:]}")
    hosts = [cluster.head, *(cluster.network.hosts[name] for name in (DATA[0], TRAINING[0]))]
    pages = open_pages(cluster.laptop, hosts)
    print("  open to everybody:", *pages)
    front = f"{DASHBOARD}/"  # a page that asks for the token
    closed = all(page == front or f"{page.rpartition('/')[0]}/metrics" in pages for page in pages)  # for Prometheus
    return {
        "good": closed and all(one.good for one in found),
        "tried": [vars(one) for one in found],
        "open pages": list(pages),
    }


def leak(cluster: Cluster, settings: list[str], folder: Path) -> dict:
    """Always good: it is here to be known."""
    canary = secrets.token_hex(24)
    job = ["--runtime-env-json", json.dumps({"env_vars": {"CANARY": canary}})]
    cluster.user.submit(cluster.log("leaking"), ["python", "-c", "import ray; ray.init()"], *job).wait(120)
    found, _ = cluster.exposed({"CANARY": canary})
    kinds = Counter(re.sub(r"hosts/\w+/tmp/ray/session_[^/]+|[0-9a-f]{12,}|\d+", "*", place) for place in found)
    for kind, count in kinds.items():
        print(f"  {count} x {kind}")
    return {"good": True, "found": dict(kinds)}


def undisturbed(cluster: Cluster, settings: list[str], folder: Path) -> dict:
    ended = run_job(cluster, "undisturbed", settings, (), LONGEST_S)
    return outcome(cluster, ended, None)


def disturbed(cluster: Cluster, settings: list[str], folder: Path) -> dict:
    network, (one, other) = cluster.network, TRAINING
    blows = (
        Blow(f"{DATA[0]} lost", lambda: network.lose(DATA[0]), line=r"\] corpus +started", after_s=5),
        Blow(
            f"{one} lost",
            lambda: network.lose(one),
            step=("pretrain", 120),
            mend=lambda: cluster.add("train3"),
            mended_after_s=REPLACED_AFTER_S,
        ),
        Blow(
            f"link of {other} cut",
            lambda: network.cut(other),
            step=("finetune", KILL_AT),
            mend=lambda: network.restore(other),
            mended_after_s=CUT_S,
        ),
    )
    return outcome(cluster, run_job(cluster, "disturbed", settings, blows, LONGEST_S), reference(folder), 5)


def resubmitted(cluster: Cluster, settings: list[str], folder: Path) -> dict:
    blow = Blow("driver killed", lambda: kill_driver(cluster.head), step=("finetune", KILL_AT))
    first = run_job(cluster, "resubmitted", settings, (blow,), LONGEST_S)
    second = run_job(cluster, "resubmitted-again", settings, (), LONGEST_S)
    found = outcome(cluster, second, reference(folder))
    continued = re.search(rf"{STAGES[1]} \[[#.]+\] +(\d+)/", second.output)
    found |= {"first": summary(first), "skipped": re.findall(r"skip +(\w+)", second.output)}
    found["went on at step"] = int(continued[1]) if continued else None
    found["good"] &= first.code != 0 and len(first.fell) == 1 and found["went on at step"] not in (None, 1, 10)
    return found


PHASES = {phase.__name__: phase for phase in (refusals, leak, undisturbed, disturbed, resubmitted)}


def outcome(cluster: Cluster, ended: Ended, expected: dict | None, events: int = 0) -> dict:
    """What is kept of a job, which so many events should have disturbed, and of what it left."""
    found = summary(ended) | {"good": ended.code == 0 and len(ended.fell) == events}
    if ended.code == 0:
        found["results"] = results(cluster)
        found["same"] = same(found["results"], expected or found["results"])
        found["good"] &= all(found["same"].values())
    found["exposed"], found["places"] = cluster.exposed(cluster.known.values())
    found["good"] &= not found["exposed"]
    return found


def summary(ended: Ended) -> dict:
    took = dict(re.findall(r"\] (\w+) +done after (\d+) s", ended.output))
    return {"code": ended.code, "seconds": ended.seconds, "fell": ended.fell, "steps": took}


def reference(folder: Path) -> dict:
    file = folder / "undisturbed.json"
    if not file.exists():
        raise SystemExit("first the phase undisturbed, in the same --folder")
    return json.loads(file.read_text())["results"]


def kill_driver(head: Host) -> None:
    drivers = [process for process in head.processes() if "pipelines/full.py" in process.cmdline()]
    assert drivers, "the head runs no driver"
    for process in drivers:
        process.kill()


def run_phase(name: str, folder: Path, settings: list[str], variables: dict[str, str]) -> dict:
    """What the phase found, kept in `folder`/NAME.json."""
    kept = folder / f"{name}.json"
    if not kept.exists():
        shutil.rmtree(folder / name, ignore_errors=True)
        cluster = Cluster(folder / name, variables)
        try:
            found = PHASES[name](cluster, settings, folder)
        finally:
            cluster.close()
        kept.write_text(json.dumps(found, indent=1))
    return json.loads(kept.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to keep what is done (default: a temporary one)")
    parser.add_argument("--phases", default=",".join(PHASES), help=f"some of {', '.join(PHASES)} (default: all)")
    parser.add_argument("--set", action="append", default=[], help="a setting of the recipe; may be repeated")
    parser.add_argument("--ray", action="append", default=[], help="NAME=VALUE in Ray's environment; may be repeated")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="drill-", dir="/tmp"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # PostgreSQL's user passes through it
    settings = [f"cluster.cpus_per_worker={WORKER_CPUS}", *options.set]
    variables = dict(variable.split("=", 1) for variable in options.ray)
    good = True
    for name in options.phases.split(","):
        print(f"{name}:", flush=True)
        found = run_phase(name, folder, settings, variables)
        good &= found["good"]
        told = {key: value for key, value in found.items() if key not in ("results", "tried", "good")}
        print(f"{'PASS' if found['good'] else 'FAIL'} {name} {json.dumps(told)}", flush=True)
    print(f"kept in {folder}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
