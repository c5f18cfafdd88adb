"""export: the trained encoder as one folder for transformers, sentence-transformers and MLflow, checked before it is let out."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster import storage
from cluster.workers import run_tasks
from moca_core.spec import BackboneSpec
from pipelines.card import model_card
from pipelines.runner.step import Context, Step
from pipelines.tables import read_table

SERVED_MODEL = Path(__file__).parents[1] / "served_model.py"
REQUIREMENTS = ["sentence-transformers>=6", "transformers>=5.17,<6", "torch>=2.11", "pillow"]
STAGES = ("base", "pretrain", "finetune", "average")  # in their order
CHECKED_PER_TASK = 2  # queries and candidates of every task that go through the parity gate


@dataclass(frozen=True)
class ExportConfig:
    """`name` is what the card calls the model; `max_tokens` the longest input that readers of the folder take."""

    name: str = "moca-embedding"
    max_tokens: int = 2048
    dtype: Literal["float32", "bfloat16"] = "float32"


def export_step(config: ExportConfig, stages: tuple[str, ...]) -> Step:
    """`stages` are those that the recipe has, from the first ("base") to the one that is exported."""
    return Step("export", run, config, needs=(*stages, "pairs", "evaluate"))


def run(context: Context) -> dict:
    """Result: {"model", "cosine": {reader: lowest cosine to the trained model}, "tracked_model"}."""
    config: ExportConfig = context.config
    inputs = context.inputs
    samples = [inputs["pairs"].path(task["path"]) for task in inputs["pairs"].result["tasks"].values()]
    last = inputs.get("average", inputs["finetune"])
    trained = last.path(last.result["model"])
    card = model_card(
        name=config.name,
        scores=storage.read_bytes(inputs["evaluate"].path("scores.md")).decode(),
        attention=inputs["evaluate"].result["attention"],
        stages={name: inputs[name].result for name in STAGES if name in inputs},
        max_tokens=config.max_tokens,
        spec=BackboneSpec.from_dict(inputs["base"].result["spec"]),
    )
    job = (config, inputs["base"].result["spec"], trained, samples, card, context.path("model"))
    context.say("writing the folder and checking it against the trained model")
    (cosine,) = run_tasks(write_and_check, [job], cpus=1, gpus=0)
    for reader, lowest in cosine.items():
        context.say(f"{reader}: lowest cosine to the trained model {lowest:.6f}")
    context.run.log_metrics({f"cosine/{reader}": lowest for reader, lowest in cosine.items()})
    folder = storage.localize(context.path("model"))
    tracked = context.run.log_model(config.name, str(SERVED_MODEL), folder, REQUIREMENTS)
    return {"model": "model", "cosine": cosine, "tracked_model": tracked}


def write_and_check(
    config: ExportConfig, spec: dict, trained: str, samples: list[str], card: str, uri: str
) -> dict[str, float]:
    """Writes the folder, passes it through the parity gate on real held-out contents, and only then uploads it."""
    import torch

    from moca_core.embedder import Embedder
    from moca_core.export import export_model
    from moca_core.parity import check_export

    trained = storage.localize(trained)
    with tempfile.TemporaryDirectory() as folder:
        export_model(
            trained,
            folder,
            BackboneSpec.from_dict(spec),
            max_tokens=config.max_tokens,
            dtype=getattr(torch, config.dtype),
        )
        (Path(folder) / "README.md").write_text(card)
        reference = Embedder(trained, max_tokens=config.max_tokens, device="cpu")
        cosine = check_export(folder, reference, [content for uri in samples for content in sample_contents(uri)])
        storage.upload(folder, uri)
    return cosine


def sample_contents(uri: str) -> list:
    """A few real queries and candidates of one task."""
    from moca_core.data.schema import rows_to_content

    contents = []
    for part in ("queries", "candidates"):
        rows = read_table(storage.join(uri, f"{part}.parquet"))["content"].slice(0, CHECKED_PER_TASK).to_pylist()
        contents += [rows_to_content(row) for row in rows]
    return contents
