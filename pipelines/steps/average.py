"""average: the mean of the fine-tuned model, its snapshots and the model before training; where it is on, it is what is exported."""

import tempfile
from dataclasses import dataclass

from cluster import storage
from cluster.workers import run_tasks
from pipelines.runner.step import Context, Step


@dataclass(frozen=True)
class AverageConfig:
    """`snapshots`: the fine-tuned model and its snapshots (`finetune.snapshots`) count alike. `base_share` of the mean is the base
    model, the rest is theirs. With neither there is no such step, and the fine-tuned model is exported as it is."""

    snapshots: bool = False
    base_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.base_share <= 1:
            raise ValueError(f"base_share={self.base_share} must be at least 0 and at most 1")
        if self.snapshots and self.base_share == 1:
            raise ValueError("snapshots=true with base_share=1.0: nothing is left for snapshots; lower the share")

    @property
    def on(self) -> bool:
        return self.snapshots or self.base_share > 0


def average_step(config: AverageConfig) -> Step:
    return Step("average", run, config, needs=("base", "finetune"))


def run(context: Context) -> dict:
    """Result: {"model", "attention", "shares": {step and folder: its share}}."""
    config: AverageConfig = context.config
    base, finetune = context.inputs["base"], context.inputs["finetune"]
    trained = [finetune.result["model"], *(finetune.result["snapshots"] if config.snapshots else [])]
    shares = {f"finetune/{folder}": (1 - config.base_share) / len(trained) for folder in trained}
    uris = [finetune.path(folder) for folder in trained]
    if config.base_share:
        shares[f"base/{base.result['model']}"] = config.base_share
        uris.append(base.path(base.result["model"]))
    context.say("the mean of " + ", ".join(f"{share:.1%} {name}" for name, share in shares.items()))
    context.run.log_metrics({f"share/{name}": share for name, share in shares.items()})
    run_tasks(write_average, [(uris, list(shares.values()), context.path("model"))], cpus=1, gpus=0)
    return {"model": "model", "attention": finetune.result["attention"], "shares": shares}


def write_average(model_uris: list[str], shares: list[float], uri: str) -> None:
    from moca_core.averaging import average_models

    with tempfile.TemporaryDirectory() as folder:
        average_models([storage.localize(model) for model in model_uris], shares, folder)
        storage.upload(folder, uri)
