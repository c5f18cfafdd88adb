"""Loading and saving a vision-language model, strictly: a weight that is missing or left over is an error."""

from types import MethodType

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from moca_core.attention import use_packed_attention


def load_backbone(folder: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The `ForConditionalGeneration` model of a Hugging Face folder, of one of the families, ready for packed sequences.

    Raises ValueError where the folder does not hold every weight: a model that is half random trains without complaint.
    """
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )  # transformers' own refusal names no weight: ours below does
    tied = set(model.all_tied_weights_keys)
    # an embedding model has no head of its own: the head is tied, or it starts from the input embedding
    missing = {key for key in info["missing_keys"] if key not in tied}
    if missing == {"lm_head.weight"}:
        model.lm_head.weight.data.copy_(model.get_input_embeddings().weight.data)
        missing = set()
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError(
            f"{folder} does not fit {type(model).__name__}: missing {sorted(missing)[:5]}, "
            f"unexpected {sorted(info['unexpected_keys'])[:5]}, of another shape {list(info['mismatched_keys'])[:5]}"
        )
    prepare(model)
    return model


def prepare(model: PreTrainedModel) -> None:
    """Makes a model take packed sequences, quickly. Nothing of it is saved with the model."""
    use_packed_attention(model)
    proj = model.model.visual.patch_embed.proj
    proj.forward = MethodType(_patches_times_weight, proj)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):  # a root-mean-square norm of any family
            module.forward = MethodType(_rms_norm, module)


def _patches_times_weight(proj: torch.nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    """A patch is one window of the convolution, which is then a matrix product: the same sums, several times as fast."""
    return torch.nn.functional.linear(patches.flatten(1), proj.weight.flatten(1), proj.bias)


def _rms_norm(norm: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """torch's own: one kernel on CUDA, which keeps the input alone for the backward pass, where the model's keeps float32 copies."""
    return torch.nn.functional.rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def save_backbone(model: PreTrainedModel, folder: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Writes config and safetensors in the `ForConditionalGeneration` layout that every serving engine maps.

    `state_dict` replaces the module's own weights (names as in `model.state_dict()`); tied copies are written once.
    """
    weights = dict(model.state_dict() if state_dict is None else state_dict)
    for duplicate in model.all_tied_weights_keys:
        weights.pop(duplicate, None)
    model.save_pretrained(folder, state_dict={name: w.contiguous() for name, w in weights.items()})


def trained_weights(objective_state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The backbone's part of an objective's state dict, under the names of `ForConditionalGeneration`.

    A head that was not trained (contrastive fine-tuning has none) is not in it.
    """
    encoder = "encoder.backbone."
    weights = {f"model.{k.removeprefix(encoder)}": w for k, w in objective_state.items() if k.startswith(encoder)}
    return weights | {k: w for k, w in objective_state.items() if k.startswith("lm_head.")}
