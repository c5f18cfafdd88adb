"""`pipelines/full.py` with a small recipe as a user starts it, and starts it again; how far it is, what its training made in the end."""

import hashlib
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file

REPOSITORY = Path(__file__).parents[1]
STAGES = ("pretrain", "finetune")
STEPS, ROWS, PAIRS, CHECKPOINT_EVERY = 80, 2, 8, 4
TEXT = {"text_hidden": 64, "text_layers": 2, "text_heads": 2, "text_kv_heads": 1, "text_intermediate": 128}
VISION = {"vision_hidden": 32, "vision_layers": 2, "vision_heads": 2, "vision_intermediate": 64}
SOURCE = {"layout": "builtin", "limit": 400}
RECIPE = {
    "recipe": "demo",
    "corpus": {"sources": [SOURCE]},
    "pairs": {"train": [SOURCE], "evaluate": [{"layout": "builtin"}]},
    "pack": {"max_tokens": 256},
    "base": {"tiny": TEXT | VISION | {"vocab_size": 1024, "max_image_px": 112 * 112}, "steps": 2, "max_tokens": 256},
    "pretrain": {"steps": STEPS, "rows_per_step": ROWS},
    "finetune": {"steps": STEPS, "batch_size": PAIRS, "max_tokens": 96},
    "evaluate": {"max_tokens": 96},
    "export": {"max_tokens": 256},
    "cluster": {"num_workers": 2, "data_tasks_per_worker": 1},
    "tracking": {"log_every_steps": 1, "checkpoint_every_steps": CHECKPOINT_EVERY},
}
WRITING = float("inf")  # the last step is done, the model not yet written
Place = tuple[int, float]  # number of the stage, steps that it has done


class Failed(Exception):
    """The command did not do what it should have."""


class Command:
    """A run of the pipeline, over all times that it is started."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self._command = [sys.executable, "pipelines/full.py", *arguments]
        self._environment = environment
        self._log = log
        self._log.unlink(missing_ok=True)
        self.seen: list[tuple[float, Place]] = []
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command,
            cwd=REPOSITORY,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # an interrupt from the keyboard is for the study, which then ends what it started
        )
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, output) -> None:
        with self._log.open("a") as log:
            for line in output:
                log.write(line)
                log.flush()
                if (place := place_of(line)) is not None:
                    self.seen.append((time.monotonic(), place))

    def ended(self) -> bool:
        return self.process.poll() is not None

    def training_s(self) -> float:
        """How long ago training began: negative before it does."""
        return time.monotonic() - self.seen[0][0] if self.seen else -1.0

    def stages_s(self) -> list[float]:
        """How long each stage has taken by now."""
        began = [min(when for when, place in self.seen if place[0] == stage) for stage in range(len(STAGES))]
        return [later - earlier for earlier, later in itertools.pairwise([*began, time.monotonic()])]

    def reached(self) -> Place:
        return max((place for _, place in self.seen), default=(0, 0))

    def passed(self, place: Place) -> float | None:
        """When it was first beyond a place."""
        return min((when for when, later in self.seen if later > place), default=None)

    def finish(self, within_s: float) -> None:
        """Wait for its end. Raises Failed if that does not come, or is not success."""
        try:
            code = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise Failed(f"not done after {within_s:.0f} s, see {self._log}") from None
        self._reader.join(5)  # no longer: what a killed driver left may hold the other end of the pipe
        if code:
            raise Failed(f"exit code {code}, see {self._log}")


def place_of(line: str) -> Place | None:
    """How far a line of the command's output says that training is."""
    if step := re.search(rf"({'|'.join(STAGES)}) \[[#.]+\] +(\d+)/\d+", line):
        return STAGES.index(step[1]), int(step[2])
    if stage := re.search(rf"\] ({'|'.join(STAGES)}) +(started|writing the model)", line):
        return STAGES.index(stage[1]), 0 if stage[2] == "started" else WRITING
    return None


def in_words(place: Place) -> str:
    stage, step = place
    return f"{STAGES[stage]} {'writing' if step == WRITING else step or 'starting'}"


@dataclass(frozen=True)
class Outcome:
    """Of every stage: SHA-256 over its weights, and what it consumed, as a count and a digest over steps and their rows.

    `restarts`: how often workers were started again.
    """

    weights: dict[str, str]
    consumed: dict[str, dict]
    restarts: int


def outcome_of(root: Path, stages: tuple[str, ...]) -> Outcome:
    folders = {stage: root / "latest" / stage for stage in stages}
    results = {stage: json.loads((folder / "record.json").read_text())["result"] for stage, folder in folders.items()}
    return Outcome(
        weights={stage: digest(folder / "model") for stage, folder in folders.items()},
        consumed={stage: result["consumed"] for stage, result in results.items()},
        restarts=sum(result["restarts"] for result in results.values()),
    )


def digest(model: Path) -> str:
    """Of name, type, shape and bytes of every tensor."""
    total = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            total.update(f"{name} {tensor.dtype} {tensor.shape} ".encode() + tensor.tobytes())
    return total.hexdigest()
