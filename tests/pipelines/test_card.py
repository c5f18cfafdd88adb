"""The model card says how this model was made, also where it was made in another way."""

import pytest

from moca_core.spec import BackboneSpec
from pipelines.card import model_card
from pipelines.runner.record import Artifact

BASE = {"parameters": 1_600_000, "spec": {}}
FINETUNE = {"steps": 4, "first": {"contrastive": 2.5}, "last": {"contrastive": 1.25}}
SHARE = {"documents": 3, "tokens": 100, "image_tokens": 40}
MIXTURE = {"obelics a": {"x": SHARE, "y": SHARE}}


def pretrained(attention: str, *losses: str) -> dict:
    return {"steps": 9, "attention": attention, "last": dict.fromkeys([*losses, "total"], 0.5)}


def card(tiny: Artifact, attention: dict[str, str], **stages: dict) -> str:
    stages["finetune"] = FINETUNE | {"attention": attention["finetune"]}
    spec = BackboneSpec.from_dict(tiny.result["spec"])
    text = model_card(
        name="m",
        scores="| task |\n",
        attention=attention,
        stages=stages,
        max_tokens=64,
        spec=spec,
        mixture=MIXTURE if "pretrain" in stages else {},
        pairs={"charts": 12},
        recipe={"finetune": {"learning_rate": 0.5}},
    )
    return " ".join(text.split())


BOTH_WAYS = {"base": "causal", "pretrain": "bidirectional", "finetune": "bidirectional"}


def test_the_whole_method(base: Artifact) -> None:
    said = card(base, BOTH_WAYS, base=BASE, pretrain=pretrained("bidirectional", "mlm", "mae"))
    assert "# m A bidirectional embedding model" in said and "text_config.is_causal = false" in said
    assert (
        "It started as a causal vision-language model, was continually pre-trained with bidirectional attention (masked "
        "language modelling and masked autoencoding) and fine-tuned with bidirectional attention" in said
    )
    assert "`base` is the model before training, with causal attention" in said
    assert "- base: parameters 1600000 - pretrain: steps 9, attention bidirectional, last mlm 0.500" in said
    assert "first contrastive 2.500, last contrastive 1.250" in said
    assert "obelics a: 6 documents, 200 tokens, 80 of them of images" in said and "charts: 12 pairs" in said
    assert "finetune: learning_rate: 0.5" in said
    assert "--max-model-len 64 --max-num-batched-tokens 8192" in said and "dimensions, normalised again" not in said


@pytest.mark.parametrize(
    ("loss", "words", "other"),
    [("mlm", "masked language modelling", "autoencoding"), ("mae", "masked autoencoding", "language modelling")],
)
def test_one_objective_alone(base: Artifact, loss: str, words: str, other: str) -> None:
    said = card(base, BOTH_WAYS, base=BASE, pretrain=pretrained("bidirectional", loss))
    assert f"({words})" in said and other not in said


def test_no_pretraining_and_causal_attention(base: Artifact) -> None:
    said = card(base, {"base": "causal", "finetune": "causal"}, base=BASE)
    assert "# m A causal embedding model" in said and "Attention is causal" in said
    assert "bidirectional" not in said and "is_causal" not in said
    assert "There was no continual pre-training" in said and "pretrain:" not in said and "masked" not in said
    assert "Continual pre-training, after cleaning" not in said


def test_each_stage_has_an_attention_of_its_own(base: Artifact) -> None:
    attention = {"base": "causal", "pretrain": "causal", "finetune": "bidirectional"}
    said = card(base, attention, base=BASE, pretrain=pretrained("causal", "mlm", "mae"))
    assert "pre-trained with causal attention" in said and "fine-tuned with bidirectional attention" in said


def test_a_model_that_was_not_scored_is_not_spoken_of(base: Artifact) -> None:
    said = card(base, {"finetune": "bidirectional"}, base=BASE, pretrain=pretrained("bidirectional", "mlm"))
    assert "`base`" not in said and "It started as a vision-language model" in said


def test_shorter_embeddings_are_told_of(base: Artifact) -> None:
    stages = {"base": BASE, "finetune": FINETUNE | {"attention": "causal", "matryoshka_dims": [8, 16]}}
    spec = BackboneSpec.from_dict(base.result["spec"])
    said = model_card(
        name="m",
        scores="",
        attention={"finetune": "causal"},
        stages=stages,
        max_tokens=9000,
        spec=spec,
        mixture={},
        pairs={},
        recipe={},
    )
    assert "The first 8, 16 dimensions, normalised again, are embeddings too." in said
    assert "--max-model-len 9000 --max-num-batched-tokens 9000" in said


def test_a_model_that_learnt_to_predict_the_next_token_is_not_called_masked(base: Artifact) -> None:
    control = pretrained("causal", "mlm") | {"objective": "next_token"}
    said = card(base, {"finetune": "causal"}, base=BASE, pretrain=control)
    assert "pre-trained with causal attention (next-token prediction)" in said and "masked" not in said
