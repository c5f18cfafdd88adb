"""The whole system on one page: which steps there are, and what each of them needs.

corpus ──▶ clean ──▶ base ──▶ pack ──▶ pretrain ──▶ finetune ──▶ (average) ──▶ evaluate ──▶ export
pairs ───────▲────────────────────────────────────────▲
  └──▶ (warmup) ──▶ (mine) ───────────────────────────┘

What the exported model does not need is left out: `pretrain.steps=0` lets fine-tuning start from the base model, and with it go
`pack`, and `corpus` and `clean` where the base model is not made from them. `average` is there where its settings ask for a mean, `mine`
where `mine.negatives` asks for hard negatives, and `warmup` (a shorter fine-tuning, whose model mines) where `mine.warmup_steps` does.
"""

from dataclasses import replace
from typing import Literal

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
from pipelines.steps.mine import mine_step
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
        *mining_steps(recipe, start),
        finetune_step(recipe.finetune, start, "mine" if recipe.mine.negatives else "pairs"),  # contrastive
        *averages,  # of its weights, its snapshots' and the base model's
        evaluate_step(recipe.evaluate, stages),  # against chance and the model before training
        export_step(recipe.export, stages),  # one folder for everybody
    ]


def mining_steps(recipe: Recipe, start: Literal["base", "pretrain"]) -> list[Step]:
    """Those that give the training pairs hard negatives, in the recipes that want them."""
    if not recipe.mine.negatives:
        return []
    mine = replace(recipe.mine, max_tokens=recipe.mine.max_tokens or recipe.finetune.max_tokens)
    if not mine.warmup_steps:
        return [mine_step(mine, start)]
    short = replace(recipe.finetune, steps=mine.warmup_steps, keep="last", snapshots=())
    return [
        finetune_step(short, start, name="warmup"),  # a model that can tell answers apart
        mine_step(mine, "warmup"),  # wrong answers that it takes for right ones
    ]
