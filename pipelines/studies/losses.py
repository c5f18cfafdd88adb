"""How the losses fell in the runs of a study: those of what is held out, or of training where nothing is."""

import json
from collections.abc import Mapping, Sequence

from cluster import storage
from pipelines.runner.plan import Planned
from pipelines.studies.collect import TRAINING
from pipelines.studies.family import Run

Losses = dict[str, dict[str, list[list[tuple[float, float]]]]]
"""{stage and loss: {variant: of every run its (tokens seen, loss)}}"""


def losses_of(runs: Sequence[Run], plans: Mapping[str, Sequence[Planned]]) -> Losses:
    """What runs share is there once, under the first one's name. Next-token losses are apart: they answer another question."""
    found: Losses = {}
    met: set[str] = set()
    for run in runs:
        for planned in plans[run.name]:
            if planned.step.name not in TRAINING or planned.done is None or planned.fingerprint in met:
                continue
            met.add(planned.fingerprint)
            kept = json.loads(storage.read_bytes(storage.join(planned.uri, "history.json")))
            rows, mark = (kept["validation"], "validation/") if kept["validation"] else (kept["history"], "")
            control = planned.done.result.get("objective") == "next_token"
            for loss in set(planned.done.result["last"]) - {"total", "accuracy"}:
                panel = f"{planned.step.name}: {'next token' if control else loss}{', held out' if mark else ''}"
                curve = [(row["tokens_seen"], row[mark + loss]) for row in rows]
                found.setdefault(panel, {}).setdefault(run.variant.name, []).append(curve)
    return dict(sorted(found.items(), reverse=True))  # pretrain before finetune
