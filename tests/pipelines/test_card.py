"""The model card says how this model was made, also where it was made in another way."""

import pytest

from moca_core.spec import BackboneSpec
from pipelines.card import model_card
from pipelines.runner.record import Artifact

BASE = {"parameters": 1_600_000, "spec": {}}
FINETUNE = {"steps": 4, "first": {"contrastive": 2.5}, "last": {"contrastive": 1.25}}


def pretrained(attention: str, *losses: str) -> dict:
    return {"steps": 9, "attention": attention, "last": dict.fromkeys([*losses, "total"], 0.5)}


def card(tiny: Artifact, attention: dict[str, str], **stages: dict) -> str:
    stages["finetune"] = FINETUNE | {"attention": attention["finetune"]}
    spec = BackboneSpec.from_dict(tiny.result["spec"])
    text = model_card(name="m", scores="| task |\n", attention=attention, stages=stages, max_tokens=64, spec=spec)
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


def test_each_stage_has_an_attention_of_its_own(base: Artifact) -> None:
    attention = {"base": "causal", "pretrain": "causal", "finetune": "bidirectional"}
    said = card(base, attention, base=BASE, pretrain=pretrained("causal", "mlm", "mae"))
    assert "pre-trained with causal attention" in said and "fine-tuned with bidirectional attention" in said


def test_a_model_that_was_not_scored_is_not_spoken_of(base: Artifact) -> None:
    said = card(base, {"finetune": "bidirectional"}, base=BASE, pretrain=pretrained("bidirectional", "mlm"))
    assert "`base`" not in said and "It started as a vision-language model" in said
