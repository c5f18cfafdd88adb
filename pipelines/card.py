"""The model card of an exported model: what it is and how it was made, read off the results of the stages that made it."""

from moca_core.spec import BackboneSpec
from moca_core.types import Attention

OBJECTIVES = {"mlm": "masked language modelling", "mae": "masked autoencoding"}
ATTENTION = {
    "bidirectional": "bidirectional through `text_config.is_causal = false`, which needs transformers 5.2 or newer",
    "causal": "causal: a token sees what stands before it, and nothing after",
}

CARD = """\
---
library_name: sentence-transformers
pipeline_tag: feature-extraction
tags: [sentence-transformers, multimodal, embedding, moca]
---
# {name}

A {kind} embedding model for text, images and any mixture of the two: {dimension} dimensions, unit length, compared by cosine.
{story}

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
vectors = model.encode(["a text", Image.open("page.png"), {{"image": Image.open("page.png"), "text": "a text"}}])
```

`transformers.AutoModel` loads the same folder; the embedding is the mean of `last_hidden_state` over all tokens. Attention is
{attention}.

## Precision@1 on held-out tasks

{columns}

{scores}
## How it was made

{settings}
## Limits

Inputs longer than {max_tokens} tokens are cut. Images are resized to between {min_px} and {max_px} pixels. The scores above are all that is
known of its quality: a model from the demo recipe is proof that the system works, not a model to build on.
"""


def model_card(
    *,
    name: str,
    scores: str,
    attention: dict[str, Attention],
    stages: dict[str, dict],
    max_tokens: int,
    spec: BackboneSpec,
) -> str:
    """`attention` is that of every model which was scored; `stages` are the results of those that ran, the last one's model is this."""
    lines = [f"- {stage}: " + ", ".join(f"{key} {value}" for key, value in summary(stages[stage])) for stage in stages]
    exported = attention[list(stages)[-1]]
    return CARD.format(
        name=name,
        kind=exported,
        dimension=spec.text_hidden,
        story=story(attention, stages),
        attention=ATTENTION[exported],
        columns=columns(attention),
        scores=scores,
        settings="\n".join(lines) + "\n",
        max_tokens=max_tokens,
        min_px=spec.min_image_px,
        max_px=spec.max_image_px,
    )


def story(attention: dict[str, Attention], stages: dict[str, dict]) -> str:
    """How the model came to be, in a sentence."""
    start = (
        f"It started as a {attention['base']} vision-language model"
        if "base" in attention
        else "It started as a vision-language model"
    )
    tuned = f"fine-tuned with {stages['finetune']['attention']} attention and a contrastive loss"
    if "average" in stages:
        tuned += f"; its weights are a mean of {len(stages['average']['shares'])} models, see below"
    if "pretrain" not in stages:
        return f"{start} and was {tuned}. There was no continual pre-training: an ablation of MoCa (arXiv 2506.23115)."
    pretrain = stages["pretrain"]
    losses = " and ".join(words for loss, words in OBJECTIVES.items() if loss in pretrain["last"])
    return (
        f"{start}, was continually pre-trained with {pretrain['attention']} attention ({losses}) and {tuned}, "
        "after MoCa (arXiv 2506.23115)."
    )


def columns(attention: dict[str, Attention]) -> str:
    """What the columns of the scores are."""
    if "base" not in attention:
        return "`chance` ranks at random."
    return f"`base` is the model before training, with {attention['base']} attention; `chance` ranks at random."


def summary(result: dict) -> list[tuple[str, object]]:
    """The numbers of a stage that belong on a model card."""
    shown = [(key, result[key]) for key in ("parameters", "steps", "attention", "matryoshka_dims") if key in result]
    shown += [(f"share of {name}", f"{share:.3f}") for name, share in result.get("shares", {}).items()]
    return shown + [
        (f"{end} {name}", f"{value:.3f}") for end in ("first", "last") for name, value in result.get(end, {}).items()
    ]
