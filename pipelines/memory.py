"""What a rank holds during a training step, calculated part by part.

Closed forms that benchmarks/memory.py holds against what a process really takes on a CPU. On a GPU they were never measured; there
`WORKING_BYTES` come on top.
"""

from dataclasses import dataclass
from typing import Literal

from moca_core.loss.fused_cross_entropy import CHUNK_LOGITS
from moca_core.spec import BackboneSpec

Checkpointing = Literal["none", "selective", "full"]

WORKING_BYTES = 3e9  # assumed: of a GPU, CUDA and NCCL, one layer's gradients, fragmentation
BUCKET_WEIGHTS = 200_000_000  # of an exchange, at most: cluster/deepspeed_config.py
LIVE_WEIGHTS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters: gathered at a time at stage 3


@dataclass(frozen=True)
class Weights:
    """Numbers of weights: all of the model, those that are trained, and those of its largest matrix."""

    total: int
    trained: int
    largest: int


@dataclass(frozen=True)
class Sharing:
    """How ranks share them (cluster/zero.py); `adds_up`: gradients of several micro-batches meet once a step."""

    zero_stage: int
    ranks: int
    adds_up: bool
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """Tokens that hold activations at a time: those of images, of masked words and of masked images among them."""

    tokens: float
    image_tokens: float
    masked_words: float = 0.0
    masked_image_tokens: float = 0.0


def state_bytes(weights: Weights, precision: Literal["fp32", "bf16"], sharing: Sharing) -> dict[str, float]:
    """Of a rank, between two steps and in one: weights, fp32 masters with AdamW's two moments, gradients, DeepSpeed's buffers."""
    stage, ranks, trained = sharing.zero_stage, sharing.ranks, weights.trained
    element, share = 2 if precision == "bf16" else 4, 1 / ranks
    masters = 4 if precision == "bf16" or stage else 0  # DeepSpeed has masters of fp32 weights too
    held = element * weights.total
    if stage == 3:
        held = 0 if sharing.offload_parameters else held * share
    optimizer = 0 if sharing.offload_optimizer else (8 + masters) * trained * (share if stage else 1)
    whole = sharing.adds_up or stage == 0
    gradients = trained * (4.0 if whole else element if stage == 1 else 4 * share)
    parts = {"weights": held, "optimizer": optimizer, "gradients": gradients}
    if stage:
        parts["buckets"] = 4.0 * min(trained, BUCKET_WEIGHTS)
    if stage == 3:  # which also keeps its share of the gradients apart from the whole ones
        parts["gathered"] = element * min(weights.total, LIVE_WEIGHTS)
        parts["gradients' share"] = 4 * trained * share if whole else 0.0
    return parts


def activation_bytes(
    spec: BackboneSpec,
    batch: MicroBatch,
    checkpointing: Checkpointing,
    precision: Literal["fp32", "bf16"] = "bf16",
    decoder_layers: int = 1,
) -> dict[str, float]:
    """Of a micro-batch from forward to backward: what the layers of both towers keep, pixels, language head, and MAE decoder."""
    element = 2 if precision == "bf16" else 4
    attention, hidden = 2 * spec.text_width + 2 * spec.text_kv_width, spec.vision_hidden
    intermediate = (spec.vision_params_per_layer - 4 * hidden**2) // (3 * hidden)
    layer, kept = (
        layer_values(spec.text_hidden, attention, spec.text_intermediate, c) for c in (checkpointing, "none")
    )
    seeing, kept_seeing = (layer_values(hidden, 4 * hidden, intermediate, c) for c in (checkpointing, "none"))
    patches = batch.image_tokens * spec.group_size
    parts = {
        "text layers": element * batch.tokens * spec.text_layers * layer,
        "vision layers": element * patches * spec.vision_layers * seeing,
        "pixels": 4 * 2 * patches * spec.patch_values * spec.temporal_patch_size,
    }
    if checkpointing != "none":  # of one layer at a time what is computed again
        again = batch.tokens * (kept - layer), patches * (kept_seeing - seeing)
        parts["one layer again"] = element * max(again)
    passing = 0.0
    if batch.masked_words:
        parts["language head"] = (
            4 * spec.vocab_size * spec.text_hidden + element * batch.masked_words * spec.text_hidden
        )
        passing = (4 if precision == "fp32" else 8) * min(batch.masked_words * spec.vocab_size, CHUNK_LOGITS)
    if batch.masked_image_tokens:
        context = decoder_layers * (2 * spec.text_hidden + 2 * spec.text_kv_width) + (decoder_layers - 1) * kept
        painted = kept + 3 * spec.group_size * spec.patch_values
        parts["decoder"] = element * (batch.tokens * context + batch.masked_image_tokens * painted)
    if passing > parts.get("decoder", 0):  # logits are gone when the decoder begins
        parts["decoder"], parts["logits"] = 0.0, passing
    return parts


def step_bytes(
    state: dict[str, float], activations: dict[str, float], weights: Weights, sharing: Sharing, micro_batches: int
) -> float:
    """The most that a rank holds at any moment of a step: at the last micro-batch's loss; or when gradients are exchanged, or in the
    optimizer, whose temporaries are as large as the largest matrix. The gradients of a single micro-batch come as its activations go;
    buckets come with the exchange, but for stage 3, which has them from the start.
    """
    gradients, buckets = state["gradients"], state.get("buckets", 0.0) if sharing.zero_stage < 3 else 0.0
    always = sum(state.values()) - gradients - buckets
    at_the_loss = sum(activations.values()) + (gradients if micro_batches > 1 else 0)
    return always + max(at_the_loss, gradients + max(buckets, 4 * weights.largest))


def layer_values(hidden: int, attention: int, intermediate: int, checkpointing: Checkpointing) -> int:
    """Of one token in one layer. Full: its input. Selective: products too (queries, keys, values and what attention gives, its
    projection, both of the gate, the way down). None: also what the gate gives, and norms, rotations and residuals."""
    if checkpointing == "full":
        return hidden
    products = hidden + attention + hidden + 2 * intermediate + hidden
    return products if checkpointing == "selective" else products + 2 * intermediate + 6 * hidden
