"""base: the causal model to start from. A checkpoint the user names, or a tiny one trained from nothing as an ordinary causal VLM."""

import os
import re
import tempfile
from dataclasses import dataclass
from itertools import count
from typing import Any

from cluster import storage
from cluster.workers import run_tasks
from moca_core.bootstrap import TinyConfig
from moca_core.rng import generator
from moca_core.spec import BackboneSpec, read_spec, with_image_bounds
from moca_core.types import Document
from pipelines.cleaned import CleanedCorpus
from pipelines.runner.step import Context, Step
from pipelines.training.config import TrainingConfig
from pipelines.training.stage import draw_training

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SAMPLE_BYTES = 256 * 2**20  # of documents: more than a tiny model reads in its few steps
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


@dataclass(frozen=True, kw_only=True)
class BaseConfig(TrainingConfig):
    """`model` is a folder (local or s3://) or a name on the hub. Without it a model of the sizes in `tiny` is trained for `steps`.

    `min_image_px` and `max_image_px` narrow the bounds of the checkpoint's own image processor.
    """

    model: str | None = None
    revision: str = "main"
    min_image_px: int | None = None
    max_image_px: int | None = None
    tiny: TinyConfig = TinyConfig()
    max_tokens: int = 1024
    steps: int = 100
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            self.model
            and storage.is_local(self.model)
            and not self.on_hub()
            and not os.path.isdir(storage.absolute(self.model))
        ):
            raise ValueError(
                f"base.model={self.model!r} is neither a folder, an s3:// URI nor a name on the hub (owner/name)"
            )
        if self.freeze:
            raise ValueError(
                f"base.freeze={list(self.freeze)}: a model from nothing has nothing worth keeping, and a given one is not trained here; "
                "set pretrain.freeze or finetune.freeze"
            )

    def on_hub(self) -> bool:
        return bool(self.model and HUB_NAME.fullmatch(self.model) and not os.path.exists(self.model))

    def identity(self) -> dict[str, Any]:
        """A given checkpoint is what it holds, wherever it lies; its training settings do not apply."""
        if self.model is None:
            given = {"tiny": self.tiny, "max_tokens": self.max_tokens}
            return given | {name: getattr(self, name) for name in TrainingConfig.__dataclass_fields__}
        content = f"hub:{self.model}@{self.revision}" if self.on_hub() else storage.digest(self.model)
        return {"content": content, "min_image_px": self.min_image_px, "max_image_px": self.max_image_px}


def base_step(config: BaseConfig) -> Step:
    return Step("base", run, config, needs=() if config.model else ("corpus", "clean"), code_version=5)


def run(context: Context) -> dict:
    """Result: {"model", "tokenizer", "spec", "parameters", "bootstrapped"}."""
    config: BaseConfig = context.config
    if config.model:
        context.say(f"copying {config.model}")
        (result,) = run_tasks(copy_checkpoint, [(config, context.path("model"))], cpus=1, gpus=0)
    else:
        cleaned = CleanedCorpus.of(context.inputs["corpus"], context.inputs["clean"])
        tracking = (context.tracking_uri, context.run.run_id)
        gpus = min(1, context.execution.cluster.gpus_per_worker)
        job = (config, cleaned, context.path("model"), tracking, context.execution.log_every_steps)
        result, history = run_tasks(bootstrap, [job], cpus=1, gpus=gpus)[0]
        result |= draw_training(context, history, ["mlm"])
        result |= {"first": {"causal_lm": history[0]["mlm"]}, "last": {"causal_lm": history[-1]["mlm"]}}
    context.say(f"{result['parameters'] / 1e6:.1f} M parameters")
    context.run.log_metrics({"parameters": result["parameters"]})
    return {"model": "model", "tokenizer": "model/tokenizer.json", "bootstrapped": not config.model, **result}


def copy_checkpoint(config: BaseConfig, uri: str) -> dict:
    """Brings the checkpoint to the pipeline's own storage, where every node finds it; checks that it is one we can convert."""
    from moca_core.backbone import load_backbone

    if config.on_hub():
        from huggingface_hub import snapshot_download

        folder = snapshot_download(config.model, revision=config.revision, allow_patterns=HUB_FILES)
    else:
        folder = storage.localize(config.model)
    spec = read_spec(folder, min_image_px=config.min_image_px, max_image_px=config.max_image_px)
    parameters = sum(p.numel() for p in load_backbone(folder).parameters())
    storage.upload(folder, uri)
    narrowed = with_image_bounds(folder, spec.min_image_px, spec.max_image_px)
    storage.write_atomic(storage.join(uri, "preprocessor_config.json"), narrowed)
    return {"spec": spec.to_dict(), "parameters": parameters}


def bootstrap(
    config: BaseConfig, cleaned: CleanedCorpus, uri: str, tracking: tuple[str, str], log_every: int
) -> tuple[dict, list[dict[str, float]]]:
    """Tokenizer, weights and a short causal training over the corpus, in one process."""
    import torch

    from cluster import tracking as tracking_module
    from cluster.engine import EngineConfig
    from cluster.torch_engine import TorchEngine
    from moca_core import bootstrap as tiny
    from moca_core.backbone import load_backbone, save_backbone, trained_weights
    from moca_core.objective.pretraining import MaskedModelling
    from pipelines.training.guard import Guard
    from pipelines.training.loop import StepReport, train
    from pipelines.training.progress import Progress

    torch.set_num_threads(min(4, os.cpu_count() or 1))
    documents = sample_documents(cleaned, config.seed)
    texts = (s.text for d in documents for s in d.content if s.text is not None)
    with tempfile.TemporaryDirectory() as folder:
        tiny.create(folder, texts, config.tiny, seed=config.seed)
        spec = read_spec(folder)
        model = load_backbone(folder)
        objective = MaskedModelling(model, spec, mae_weight=0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        settings = EngineConfig(
            precision=config.precision, max_grad_norm=config.max_grad_norm, weight_decay=config.weight_decay
        )
        engine = TorchEngine(objective, settings, device)
        run, history = tracking_module.attach(*tracking), []
        progress, guard = Progress("base", config.steps, log_every), Guard(config.abort_above)

        def after_step(report: StepReport) -> None:
            if problem := guard.judge(report.metrics["total"], report.metrics["grad_norm"]):
                raise FloatingPointError(f"base, step {report.step}: {problem}")
            if (row := progress.add(report)) is not None:
                history.append(row)
                run.log_metrics({k: v for k, v in row.items() if k != "step"}, step=report.step)
                print(progress.line(row), flush=True)

        stream = causal_stream(documents, folder, spec, config)
        train(engine, objective, stream, config, sum_over_ranks=lambda x: x, after_step=after_step)
        run.flush()
        save_backbone(model, folder, trained_weights(objective.state_dict()))
        storage.upload(folder, uri)
    return {"spec": spec.to_dict(), "parameters": sum(p.numel() for p in model.parameters())}, history


def sample_documents(cleaned: CleanedCorpus, seed: int) -> list[Document]:
    """Documents from all over the corpus, in its order, as many as one process can hold."""
    groups, chosen, held_bytes = cleaned.groups(), [], 0
    for place in generator(seed, "sample").permutation(len(groups)):
        held_bytes += groups[place].bytes
        if chosen and held_bytes > SAMPLE_BYTES:
            break
        chosen.append(int(place))
    return [document for place in sorted(chosen) for document in cleaned.read(groups[place])]


def causal_stream(documents: list, folder: str, spec: BackboneSpec, config: BaseConfig):
    """(step, [one packed batch]) with every text token as a label, epoch after epoch in new order."""
    from moca_core.data.masking import next_token
    from moca_core.data.render import Renderer, load_tokenizer
    from moca_core.data.rows import pack_contents

    renderer = Renderer(load_tokenizer(os.path.join(folder, "tokenizer.json")), spec, config.max_tokens)
    pieces = [piece for document in documents for piece in renderer.pieces(document.content)]
    rows = [row for _, row in pack_contents(pieces, spec, config.max_tokens)]
    step = 0
    for epoch in count():
        for index in generator(config.seed, epoch, "base").permutation(len(rows)):
            if step == config.steps:
                return
            yield step, [next_token(rows[index], spec, seed=config.seed, epoch=epoch)]
            step += 1
