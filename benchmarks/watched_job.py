"""`ray job submit` of the pipeline, watched by what it prints; blows that fall when it is so far."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from drill_cluster import Cluster
from watched_command import STAGES, digest, place_of

ROOT = "s3://moca/run"


@dataclass(frozen=True)
class Blow:
    """What happens, `after_s` behind the first line of the job that matches `line`, or the first that is at or past `step`.

    `step`: (stage, step) of training. `mend`: what is done about it `mended_after_s` later.
    """

    what: str
    act: Callable[[], object]
    line: str = ""
    step: tuple[str, int] | None = None
    after_s: float = 0.0
    mend: Callable[[], object] | None = None
    mended_after_s: float = 0.0

    def due(self, line: str) -> bool:
        if self.step is None:
            return bool(re.search(self.line, line))
        place = place_of(line)
        return place is not None and place >= (STAGES.index(self.step[0]), self.step[1])


@dataclass(frozen=True)
class Ended:
    """Exit code of the submission, seconds that it took, when which blow fell, and all that it printed."""

    code: int
    seconds: float
    fell: list[tuple[float, str]]
    output: str


def run_job(cluster: Cluster, name: str, settings: list[str], blows: tuple[Blow, ...], within_s: float) -> Ended:
    """Submits the pipeline and waits for its end; the blows fall one after the other."""
    log = cluster.log(name)
    command = ["python", "pipelines/full.py", "--recipe", "demo", "--root", ROOT]
    command += [part for setting in settings for part in ("--set", setting)]
    process = cluster.user.submit(log, command)
    began, read, waiting, fell = time.monotonic(), 0, list(blows), []
    due: list[tuple[float, str, Callable[[], object]]] = []  # when, what
    while process.poll() is None:
        now = time.monotonic()
        if now - began > within_s:
            process.kill()
            break
        lines = log.read_text(errors="replace").splitlines()
        if waiting and any(map(waiting[0].due, lines[read:])):
            blow = waiting.pop(0)
            due.append((now + blow.after_s, blow.what, blow.act))
            if blow.mend:
                due.append((now + blow.after_s + blow.mended_after_s, f"{blow.what}: mended", blow.mend))
        read = len(lines)
        for action in [action for action in due if action[0] <= now]:
            due.remove(action)
            fell.append((round(now - began, 1), action[1]))
            print(f"  {name}: {now - began:.0f} s, {action[1]}; last line: {lines[-1][-100:]}", flush=True)
            action[2]()
        time.sleep(0.2)
    return Ended(process.wait(), round(time.monotonic() - began, 1), fell, log.read_text(errors="replace"))


def results(cluster: Cluster) -> dict:
    """What the run made: scores, what training consumed, how often it was started again, digests of its weights."""
    run = cluster.folder / "s3" / ROOT.removeprefix("s3://")
    found = {}
    for step in (*STAGES, "evaluate"):
        (record,) = run.glob(f"{step}/*/record.json")
        result = json.loads(record.read_text())["result"]
        if step == "evaluate":
            found["scores"] = {"precision@1": result["scores"], "nDCG@5": result["ndcg_at_5"]}
        else:
            found[step] = {"consumed": result["consumed"], "weights": digest(record.parent / "model")}
            found[f"{step} restarts"] = result["restarts"]
    return found


def same(found: dict, reference: dict) -> dict[str, bool]:
    """Of scores and of every training stage: whether they are what they are in an undisturbed run."""
    return {name: found[name] == reference[name] for name in ("scores", *STAGES)}
