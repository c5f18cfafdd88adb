"""The whole system on one page: which steps there are, and what each of them needs.

corpus ──▶ clean ──▶ base ──▶ pack ──▶ pretrain ──▶ finetune ──▶ (average) ──▶ evaluate ──▶ export
pairs ───────▲────────────────────────────────────────▲

What the exported model does not need is left out: `pretrain.steps=0` lets fine-tuning start from the base model, and with it go
`pack`, and `corpus` and `clean` where the base model is not made from them. `average` is there where its settings ask for a mean.
"""

from pipelines.recipe import Recipe
from pipelines.runner.plan import needed
from pipelines.runner.step import Step
from pipelines.steps.average import average_step
from pipelines.steps.base import base_step
from pipelines.steps.clean import clean_step
from pipelines.steps.corpus import corpus_step
from pipelines.steps.evaluate import evaluate_step
from pipelines.steps.export import export_step
from pipelines.steps.finetune import finetune_step
from pipelines.steps.pack import pack_step
from pipelines.steps.pairs import pairs_step
from pipelines.steps.pretrain import pretrain_step


def build(recipe: Recipe) -> list[Step]:
    """The steps that lead to the exported model."""
    steps = every_step(recipe)
    wanted = needed({step.name: step for step in steps}, "export")
    return [step for step in steps if step.name in wanted]


def left_out(recipe: Recipe) -> dict[str, str]:
    """{step: the setting that leaves it out} of the other steps."""
    built = {step.name for step in build(recipe)}
    return {
        step.name: f"pretrain.steps={recipe.pretrain.steps}" for step in every_step(recipe) if step.name not in built
    }


def every_step(recipe: Recipe) -> list[Step]:
    start = "pretrain" if recipe.pretrain.steps else "base"
    averages = [average_step(recipe.average)] if recipe.average.on else []
    stages = (*dict.fromkeys(("base", start, "finetune")), *(step.name for step in averages))
    return [
        corpus_step(recipe.corpus),  # documents: read, validated
        pairs_step(recipe.pairs),  # pairs and evaluation tasks: read, validated
        clean_step(recipe.clean),  # copies, and what the evaluation tasks hold, taken out
        base_step(recipe.base),  # the causal model to start from, and its tokenizer
        pack_step(recipe.pack),  # documents as token rows of one budget
        pretrain_step(recipe.pretrain),  # bidirectional, MLM + MAE
        finetune_step(recipe.finetune, start=start),  # contrastive
        *averages,  # of its weights, its snapshots' and the base model's
        evaluate_step(recipe.evaluate, stages),  # against chance and the model before training
        export_step(recipe.export, stages),  # one folder for everybody
    ]
