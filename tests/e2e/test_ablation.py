"""Three ablations of docs/studies.md in one real run: no continual pre-training, causal attention, batches of all tasks."""

import json

import pytest
import torch
from transformers import AutoModel

from tests.e2e.conftest import pipeline, recipe_file

ABLATED = ("pretrain.steps=0", "finetune.attention=causal", "finetune.task_batches=false")
BUILTIN = ("pairs.train=[{layout: builtin}]", "pairs.evaluate=[{layout: builtin}]")  # four tasks
STEPS = ("corpus", "pairs", "clean", "base", "finetune", "evaluate", "export")


def verdicts(output: str) -> dict[str, str]:
    lines = [line.split() for line in output.splitlines() if line.startswith("  ")]
    return {words[1]: words[0] for words in lines if words[0] in ("run", "skip", "off")}


@pytest.mark.slow
def test_a_causal_model_without_pretraining_from_mixed_batches(tmp_path):
    arguments = ["--recipe", str(recipe_file(tmp_path)), "--root", str(tmp_path / "root")]
    arguments += [word for setting in BUILTIN for word in ("--set", setting)]
    run = pipeline(*arguments, *(word for setting in ABLATED for word in ("--set", setting)))
    assert run.code == 0, run.output[-3000:]
    assert verdicts(run.output) == dict.fromkeys(STEPS, "run") | {"pack": "off", "pretrain": "off"}
    assert "4 batches of 8, each over 4 tasks" in run.output

    latest = tmp_path / "root" / "latest"
    assert {folder.name for folder in latest.iterdir()} == set(STEPS)
    records = {step: json.loads((latest / step / "record.json").read_text()) for step in STEPS}
    assert set(records["finetune"]["payload"]["needs"]) == {"base", "pairs"}
    assert records["finetune"]["result"]["steps"] == 4
    scored = records["evaluate"]["result"]
    assert all(list(row) == ["chance", "base", "finetune"] for row in scored["scores"].values()) and scored["scores"]
    assert scored["attention"] == {"base": "causal", "finetune": "causal"}
    assert min(records["export"]["result"]["cosine"].values()) > 0.9999

    model = latest / "export" / "model"
    config = json.loads((model / "config.json").read_text())
    assert config["is_causal"] is True and config["text_config"]["is_causal"] is True
    card = (model / "README.md").read_text()
    assert "no continual pre-training" in card and "Attention is\ncausal" in card and "bidirectional" not in card
    ids = torch.arange(20, 32)[None]
    other = ids.clone()
    other[0, -1] += 1
    network = AutoModel.from_pretrained(model).eval()
    with torch.no_grad():
        one, two = (network(input_ids=i, use_cache=False).last_hidden_state[0] for i in (ids, other))
    assert torch.equal(one[0], two[0]) and not torch.equal(one[-1], two[-1])

    plan = pipeline(*arguments, "--dry-run").output  # the whole method beside it
    shared = dict.fromkeys(("corpus", "pairs", "clean", "base"), "skip")
    whole = dict.fromkeys(("pack", "pretrain", "finetune", "evaluate", "export"), "run")
    assert verdicts(plan) == shared | whole
    assert 'attention: "causal" -> "bidirectional"' in plan and "with pretrain" in plan
