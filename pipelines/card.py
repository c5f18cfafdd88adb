"""The model card of an exported model: what it is and how it was made, read off the results of the stages that made it."""

import yaml

from moca_core.spec import BackboneSpec
from moca_core.types import Attention

OBJECTIVES = {"mlm": "masked language modelling", "mae": "masked autoencoding"}
NEXT_TOKEN = "next-token prediction"
ATTENTION = {
    "bidirectional": "bidirectional through `text_config.is_causal = false`, which needs transformers 5.2 or newer",
    "causal": "causal: a token sees what stands before it, and nothing after",
}

SHARES = ("documents", "tokens", "image_tokens")

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

The project that made it embeds folders, PDFs and tables with it (`python pipelines/embed.py --model path/to/this/folder --out
vectors.parquet INPUTS`), and searches them (`pipelines/search.py`; docs/using.md there).

`transformers.AutoModel` and `AutoProcessor` load the same folder: render with the chat template, take the mean of `last_hidden_state`
over all tokens, normalise. Attention is {attention}.
{shorter}
Served by vLLM (0.33 reads the attention, the pooling and the normalising from this folder; a batch must hold a whole input, as attention
is not computed in chunks):

```bash
{vllm}
curl localhost:8000/v1/embeddings -H 'Content-Type: application/json' -d '{{"model": "{name}", "input": ["a text"]}}'
```

## Scores on held-out tasks

{columns}

{scores}
## Data

{data}
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
    mixture: dict[str, dict[str, dict]],
    pairs: dict[str, int],
    recipe: dict[str, dict],
) -> str:
    """`attention` is that of every model which was scored; `stages` are the results of those that ran, the last one's model is this.

    `mixture` is what pre-training read, {source: {name: Share}} as `pack` records it, `pairs` how many there were of every task, `recipe`
    the settings of every stage.
    """
    lines = [f"- {stage}: " + ", ".join(f"{key} {value}" for key, value in summary(stages[stage])) for stage in stages]
    said = yaml.safe_dump(recipe, sort_keys=False, width=120)
    lines += ["", "<details><summary>Every setting</summary>", "", f"```yaml\n{said}```", "", "</details>"]
    dims = stages["finetune"].get("matryoshka_dims", [])
    exported = attention[list(stages)[-1]]
    return CARD.format(
        name=name,
        kind=exported,
        dimension=spec.text_hidden,
        story=story(attention, stages),
        attention=ATTENTION[exported],
        columns=columns(attention),
        scores=scores,
        shorter=f"The first {', '.join(map(str, dims))} dimensions, normalised again, are embeddings too.\n"
        if dims
        else "",
        vllm=vllm_command(name, max_tokens),
        data=data(mixture, pairs),
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
    if pretrain.get("objective") == "next_token":
        losses = NEXT_TOKEN
    return (
        f"{start}, was continually pre-trained with {pretrain['attention']} attention ({losses}) and {tuned}, "
        "after MoCa (arXiv 2506.23115)."
    )


def columns(attention: dict[str, Attention]) -> str:
    """What the columns of the scores are."""
    if "base" not in attention:
        return "`chance` ranks at random."
    return f"`base` is the model before training, with {attention['base']} attention; `chance` ranks at random."


def vllm_command(name: str, max_tokens: int) -> str:
    """Whatever is not on this line vLLM reads from the folder; `benchmarks/vllm_reading.py` asks vLLM itself what it reads."""
    batch = max(max_tokens, 8192)
    lengths = f"--max-model-len {max_tokens} --max-num-batched-tokens {batch}"
    return f"vllm serve path/to/this/folder --served-model-name {name} --runner pooling --convert embed {lengths}"


def data(mixture: dict[str, dict[str, dict]], pairs: dict[str, int]) -> str:
    """What it was trained on, as two lists."""
    lines = []
    if mixture:
        lines += ["Continual pre-training, after cleaning:", ""]
        for source, names in mixture.items():
            documents, tokens, images = (sum(share[key] for share in names.values()) for key in SHARES)
            lines.append(f"- {source}: {documents} documents, {tokens} tokens, {images} of them of images")
        lines.append("")
    lines += ["Fine-tuning:", "", *(f"- {task}: {count} pairs" for task, count in pairs.items())]
    return "\n".join(lines) + "\n"


def summary(result: dict) -> list[tuple[str, object]]:
    """The numbers of a stage that belong on a model card."""
    shown = [(key, result[key]) for key in ("parameters", "steps", "attention", "matryoshka_dims") if key in result]
    shown += [(f"share of {name}", f"{share:.3f}") for name, share in result.get("shares", {}).items()]
    return shown + [
        (f"{end} {name}", f"{value:.3f}") for end in ("first", "last") for name, value in result.get(end, {}).items()
    ]
