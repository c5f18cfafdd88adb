"""Which recipes a study compares: variants as data, the paper's rows and the controls that it lacks."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from pipelines.recipe import Recipe, load_recipe

REFERENCE = "full"


@dataclass(frozen=True)
class Variant:
    """A row of the table: what it asks, and its settings as `--set` takes them. In a scaling study it is a point on an axis."""

    name: str
    asks: str
    changes: tuple[str, ...] = ()
    axis: str = ""


NO_MAE = ("pretrain.mae_ratio=0", "pretrain.mae_weight=0")
NEXT_TOKEN = ("pretrain.objective=next_token", "pretrain.attention=causal", "pretrain.shift=true", *NO_MAE)
CAUSAL = "finetune.attention=causal"


def ablation(recipe: Recipe) -> list[Variant]:
    """Table 3 of the paper, then its controls. The first is what the others are compared with."""
    tasks = {}
    if any(source.layout == "builtin" for source in recipe.pairs.train):
        tasks = {"text_pairs": "summary_to_text", "document_pairs": "summary_to_page"}
    shift = recipe.pretrain.shift
    return [
        Variant(REFERENCE, "the whole method"),
        Variant("no_pretraining", "is continual pre-training worth its cost?", ("pretrain.steps=0",)),
        Variant("mlm_only", "is restoring patches worth it?", NO_MAE),
        Variant("mae_only", "is restoring words worth it?", ("pretrain.mlm_ratio=0", "pretrain.mlm_weight=0")),
        *(without_pairs(recipe, name, task) for name, task in tasks.items()),
        Variant("mixed_batches", "are batches of one task worth it?", ("finetune.task_batches=false",)),
        Variant(
            "unshifted_mlm" if shift else "shifted_mlm",
            "does it matter from which place a word is predicted?",
            (f"pretrain.shift={str(not shift).lower()}",),
        ),
        Variant("causal", "is it the attention? Both stages with the old one", ("pretrain.attention=causal", CAUSAL)),
        Variant("causal_no_pretraining", "does the same fine-tuning alone do it?", ("pretrain.steps=0", CAUSAL)),
        Variant("next_token_causal", "do as many steps of ordinary language modelling do it?", (*NEXT_TOKEN, CAUSAL)),
        Variant("next_token", "the same, with attention opened in fine-tuning", NEXT_TOKEN),
    ]


def without_pairs(recipe: Recipe, name: str, *patterns: str) -> Variant:
    """The tasks that the patterns match are left out of fine-tuning; `name` says what they have in common."""
    excluded = f"finetune.exclude={[*recipe.finetune.exclude, *patterns]}"
    return Variant(f"no_{name}", "are these pairs worth it?", (excluded,))


def scaling(recipe: Recipe) -> list[Variant]:
    """Points around the recipe on the AXES; it is itself a point of each. Batches grow at equal data: with them fall the steps."""
    steps, rows, pairs = recipe.pretrain.steps, recipe.pretrain.rows_per_step, recipe.finetune
    points = [Variant(REFERENCE, "the recipe as it is")]
    points += [
        Variant(f"steps_{factor:g}", "more pre-training?", (f"pretrain.steps={round(steps * factor)}",), "steps")
        for factor in (1 / 8, 1 / 4, 1 / 2, 2)
    ]
    points += [
        Variant(f"data_{factor:g}", "more documents, as many steps?", (f"pretrain.data_fraction={share:g}",), "data")
        for factor in (1 / 8, 1 / 4, 1 / 2)
        for share in [recipe.pretrain.data_fraction * factor]
    ]
    if recipe.base.model is None:
        points += [
            Variant(f"width_{factor:g}", "a wider model?", widened(recipe, factor), "width") for factor in (1 / 2, 2)
        ]
    points += [
        Variant(
            f"rows_{factor}",
            "larger batches of as many rows?",
            (f"pretrain.rows_per_step={rows * factor}", f"pretrain.steps={max(1, steps // factor)}"),
            "rows",
        )
        for factor in (2, 4)
    ]
    points += [
        Variant(
            f"pairs_{factor:g}",
            "larger batches of as many pairs?",
            (
                f"finetune.batch_size={round(pairs.batch_size * factor)}",
                f"finetune.steps={round(pairs.steps / factor)}",
            ),
            "pairs",
        )
        for factor in (1 / 4, 1 / 2, 2)
    ]
    return [*points, Variant("no_pretraining", "where the curve of steps begins", ("pretrain.steps=0",))]


def widened(recipe: Recipe, factor: float) -> tuple[str, ...]:
    """Hidden sizes times `factor`, rounded to whole heads of the size that they have; inner sizes as many times these as before."""
    tiny, changes = recipe.base.tiny, {}
    for tower in ("text", "vision"):
        heads = max(1, round(getattr(tiny, f"{tower}_heads") * factor))
        hidden, inner = getattr(tiny, f"{tower}_hidden"), getattr(tiny, f"{tower}_intermediate")
        wide = heads * (hidden // getattr(tiny, f"{tower}_heads"))
        changes |= {f"{tower}_heads": heads, f"{tower}_hidden": wide}
        changes[f"{tower}_intermediate"] = round(inner * wide / hidden)
    changes["text_kv_heads"] = max(1, round(tiny.text_kv_heads * factor))
    return tuple(f"base.tiny.{name}={value}" for name, value in changes.items())


AXES: dict[str, tuple[str, Callable[[Recipe], float]]] = {  # what a point's recipe has there
    "steps": ("pre-training steps", lambda recipe: recipe.pretrain.steps),
    "data": ("share of the packed rows", lambda recipe: recipe.pretrain.data_fraction),
    "width": ("hidden size", lambda recipe: recipe.base.tiny.text_hidden),
    "rows": ("rows of a pre-training step, at equal data", lambda recipe: recipe.pretrain.rows_per_step),
    "pairs": ("pairs of a fine-tuning step, at equal data", lambda recipe: recipe.finetune.batch_size),
}
FAMILIES: dict[str, Callable[[Recipe], list[Variant]]] = {"ablation": ablation, "scaling": scaling}


@dataclass(frozen=True)
class Run:
    """A variant with the seed number `seed`, from 0."""

    variant: Variant
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.variant.name}-seed{self.seed}"


def runs_of(name: str, overrides: list[str], variants: list[Variant], seeds: int) -> list[Run]:
    """All variants of the first seed, then those of the next. Seeds vary what training draws: not the base model, not the data.

    Only the finished model is scored, so that nothing is embedded twice. Raises ValueError where a variant's recipe is refused, or is
    the recipe of another.
    """
    whole = load_recipe(name, overrides)
    scored = f"evaluate.models=[{'average' if whole.average.on else 'finetune'}]"
    recipes = {}
    for variant in variants:
        try:
            recipe = load_recipe(name, [*overrides, *variant.changes, scored])
        except ValueError as error:
            raise ValueError(f"variant {variant.name} ({' '.join(variant.changes)}): {error}") from None
        if same := [other for other, known in recipes.items() if known == recipe]:
            raise ValueError(
                f"variant {variant.name} is the same recipe as {same[0]}: name those that you want with --only"
            )
        recipes[variant.name] = recipe
    return [Run(variant, seed, seeded(recipes[variant.name], seed)) for seed in range(seeds) for variant in variants]


def seeded(recipe: Recipe, seed: int) -> Recipe:
    pretrain, finetune = recipe.pretrain, recipe.finetune
    return replace(
        recipe,
        pretrain=replace(pretrain, seed=pretrain.seed + seed),
        finetune=replace(finetune, seed=finetune.seed + seed),
    )
