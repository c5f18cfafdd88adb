"""The whole system on one page: which steps there are, and what each of them needs.

corpus ──▶ clean ──▶ base ──▶ pack ──▶ pretrain ──▶ finetune ──▶ evaluate ──▶ export
pairs ───────▲────────────────────────────────────────▲
"""

from pipelines.recipe import Recipe
from pipelines.runner.step import Step
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
    return [
        corpus_step(recipe.corpus),  # documents: read, validated
        pairs_step(recipe.pairs),  # pairs and evaluation tasks: read, validated
        clean_step(recipe.clean),  # copies, and what the evaluation tasks hold, taken out
        base_step(recipe.base),  # the causal model to start from, and its tokenizer
        pack_step(recipe.pack),  # documents as token rows of one budget
        pretrain_step(recipe.pretrain),  # bidirectional, MLM + MAE
        finetune_step(recipe.finetune),  # contrastive
        evaluate_step(recipe.evaluate),  # against chance and the model before training
        export_step(recipe.export),  # one folder for everybody
    ]
