"""export: the trained encoder as one folder for transformers, sentence-transformers and MLflow, checked before it is let out."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster import storage
from cluster.workers import run_tasks
from moca_core.spec import BackboneSpec
from pipelines.card import model_card
from pipelines.runner import record
from pipelines.runner.step import Context, Step
from pipelines.tables import read_table

SERVED_MODEL = Path(__file__).parents[1] / "served_model.py"
COLUMNS = {"text": "string", "image": "binary"}  # of the table that it takes
REQUIREMENTS = ["sentence-transformers>=6", "transformers>=5.17,<6", "torch>=2.11", "pillow"]
STAGES = ("base", "pretrain", "finetune", "average")  # in their order
CHECKED_PER_TASK = 2  # queries and candidates of every task that go through the parity gate


@dataclass(frozen=True)
class ExportConfig:
    """`name` is what the card and MLflow's registry call the model; `alias` is what the registry calls its newest version.
    `max_tokens` is the longest input that readers of the folder take."""

    name: str = "moca-embedding"
    alias: str = "newest"
    max_tokens: int = 2048
    dtype: Literal["float32", "bfloat16"] = "float32"


def export_step(config: ExportConfig, stages: tuple[str, ...]) -> Step:
    """`stages` are those that the recipe has, from the first ("base") to the one that is exported."""
    packed = ("pack",) if "pretrain" in stages else ()
    return Step("export", run, config, needs=(*stages, *packed, "pairs", "evaluate"), code_version=3)


def run(context: Context) -> dict:
    """Result: {"model", "cosine": {reader: lowest cosine to the trained model}, "tracked_model", "registered": {"name", "version",
    "alias"}}."""
    config: ExportConfig = context.config
    inputs = context.inputs
    samples = [inputs["pairs"].path(task["path"]) for task in inputs["pairs"].result["tasks"].values()]
    last = inputs.get("average", inputs["finetune"])
    trained = last.path(last.result["model"])
    ran = [name for name in STAGES if name in inputs]
    recipe = {name: found.payload["config"] for name in ran if (found := record.read(inputs[name].uri))}
    trained_on = {task: sum(n for _, n in files) for task, files in inputs["pairs"].result["train"].items()}
    dims = inputs["finetune"].result.get("matryoshka_dims", [])
    card = model_card(
        name=config.name,
        scores=storage.read_bytes(inputs["evaluate"].path("scores.md")).decode(),
        attention=inputs["evaluate"].result["attention"],
        stages={name: inputs[name].result for name in ran},
        max_tokens=config.max_tokens,
        spec=BackboneSpec.from_dict(inputs["base"].result["spec"]),
        mixture=inputs["pack"].result["mixture"] if "pack" in inputs else {},
        pairs=trained_on,
        recipe=recipe,
    )
    job = (config, inputs["base"].result["spec"], dims, trained, samples, card, context.path("model"))
    context.say("writing the folder and checking it against the trained model")
    (cosine,) = run_tasks(write_and_check, [job], cpus=1, gpus=0)
    for reader, lowest in cosine.items():
        context.say(f"{reader}: lowest cosine to the trained model {lowest:.6f}")
    context.run.log_metrics({f"cosine/{reader}": lowest for reader, lowest in cosine.items()})
    folder = storage.localize(context.path("model"))
    dimension = inputs["base"].result["spec"]["text_hidden"]
    tracked = context.run.log_model(
        config.name, str(SERVED_MODEL), folder, REQUIREMENTS, COLUMNS, output_shape=(-1, dimension)
    )
    version = context.run.register_model(config.name, tracked, config.alias, card.split("```")[0].split("---\n")[-1])
    context.say(f"registered in MLflow: models:/{config.name}@{config.alias}, version {version}")
    registered = {"name": config.name, "version": version, "alias": config.alias}
    return {"model": "model", "cosine": cosine, "tracked_model": tracked, "registered": registered}


def write_and_check(
    config: ExportConfig, spec: dict, dims: list[int], trained: str, samples: list[str], card: str, uri: str
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
            matryoshka_dims=dims,
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
