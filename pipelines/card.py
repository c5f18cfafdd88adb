"""The model card of an exported model."""

CARD = """\
---
library_name: sentence-transformers
pipeline_tag: feature-extraction
tags: [sentence-transformers, multimodal, embedding, moca]
---
# {name}

A bidirectional embedding model for text, images and any mixture of the two: {dimension} dimensions, unit length, compared by cosine.
It started as a causal vision-language model, was continually pre-trained with bidirectional attention (masked language modelling
and masked autoencoding together) and fine-tuned with a contrastive loss, after MoCa (arXiv 2506.23115).

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
vectors = model.encode(["a text", Image.open("page.png"), {{"image": Image.open("page.png"), "text": "a text"}}])
```

`transformers.AutoModel` loads the same folder; the embedding is the mean of `last_hidden_state` over all tokens. Attention is
bidirectional through `text_config.is_causal = false`, which needs transformers 5.2 or newer.

## Precision@1 on held-out tasks

`base` is the same model before training, made bidirectional and mean-pooled; `chance` ranks at random.

{scores}
## How it was made

{settings}
## Limits

Inputs longer than {max_tokens} tokens are cut. Images are resized to between {min_px} and {max_px} pixels. The scores above are all that is
known of its quality: a model from the demo recipe is proof that the system works, not a model to build on.
"""


def model_card(*, name: str, scores: str, settings: dict[str, dict], max_tokens: int, spec) -> str:
    lines = [
        f"- {stage}: " + ", ".join(f"{key} {value}" for key, value in values.items())
        for stage, values in settings.items()
    ]
    return CARD.format(
        name=name,
        dimension=spec.text_hidden,
        scores=scores,
        settings="\n".join(lines) + "\n",
        max_tokens=max_tokens,
        min_px=spec.min_image_px,
        max_px=spec.max_image_px,
    )
