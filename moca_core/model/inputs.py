"""A packed stream on the training device: pixels normalised, noised and copied in time there, not on the CPU workers.

All that depends on shapes alone (indices, window orders, longest sequences) is worked out here, from numpy, before the device is
asked for anything: a forward that has to read a value back from a GPU stops feeding it.
"""

from dataclasses import dataclass

import numpy as np
import torch

from moca_core.family import family_of
from moca_core.spec import BackboneSpec
from moca_core.types import TokenStream


@dataclass
class DeviceStream:
    """TokenStream as tensors. `pixel_values` are normalised floats in the processor's layout.

    A stream without images carries one blank group of patches that no token refers to (`image_positions` is empty).
    """

    input_ids: torch.Tensor  # [T]
    cu_seqlens: torch.Tensor  # [S+1] int32
    max_seqlen: int
    position_ids: torch.Tensor  # [4, T]
    image_positions: torch.Tensor  # [image tokens] where they stand in the stream
    pixel_values: torch.Tensor  # [P, channels * temporal_patch_size * patch²]
    grid_thw: torch.Tensor  # [N, 3], on the CPU
    vision_inputs: dict[str, torch.Tensor | int]  # of the family: what the vision tower would work out from grid_thw

    @property
    def lengths(self) -> torch.Tensor:
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]


def to_device(stream: TokenStream, spec: BackboneSpec, device: torch.device) -> DeviceStream:
    pixels, grids = stream.pixels, stream.grid_thw
    if not len(grids):
        pixels = np.zeros((spec.group_size, spec.patch_values), np.uint8)
        grids = np.array([[1, spec.merge_size, spec.merge_size]])
    grid_thw = torch.from_numpy(grids)
    vision_inputs = family_of(spec.model_type).vision_inputs(grid_thw, spec)
    return DeviceStream(
        input_ids=move(stream.input_ids, device),
        cu_seqlens=move(stream.cu_seqlens, device),
        max_seqlen=int(np.diff(stream.cu_seqlens).max()),
        position_ids=move(stream.position_ids, device),
        image_positions=move(np.flatnonzero(stream.input_ids == spec.image_token_id), device),
        pixel_values=repeat_in_time(normalise(move(pixels, device), spec), spec),
        grid_thw=grid_thw,
        vision_inputs={k: v if isinstance(v, int) else v.to(device) for k, v in vision_inputs.items()},
    )


def move(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def normalise(pixels: torch.Tensor, spec: BackboneSpec) -> torch.Tensor:
    """uint8 patches [P, C * patch²] to float32, with the processor's mean and deviation per channel."""
    values = pixels.view(len(pixels), spec.channels, spec.patch_size_px**2).float() / 255
    mean, std = (torch.tensor(x, device=pixels.device)[:, None] for x in (spec.image_mean, spec.image_std))
    return ((values - mean) / std).flatten(1)


def denormalise(values: torch.Tensor, spec: BackboneSpec) -> torch.Tensor:
    """The inverse of `normalise`: float [P, C * patch²] to the nearest uint8, what lies beyond black and white cut off."""
    values = values.float().view(len(values), spec.channels, spec.patch_size_px**2)
    mean, std = (torch.tensor(x, device=values.device)[:, None] for x in (spec.image_mean, spec.image_std))
    return ((values * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).flatten(1)


def repeat_in_time(values: torch.Tensor, spec: BackboneSpec) -> torch.Tensor:
    """[P, C * patch²] to [P, C * temporal * patch²]: a still image is the same frame at every step of a temporal patch."""
    frames = values.view(len(values), spec.channels, 1, spec.patch_size_px**2)
    return frames.expand(-1, -1, spec.temporal_patch_size, -1).flatten(1)


def first_frame(values: torch.Tensor, spec: BackboneSpec) -> torch.Tensor:
    """The inverse of `repeat_in_time`."""
    return values.view(len(values), spec.channels, spec.temporal_patch_size, spec.patch_size_px**2)[:, :, 0].flatten(1)


def unit_noise(seeds: np.ndarray, patches: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """Unit Gaussian vectors [patches.sum(), values of `like`'s rows], `patches[i]` of them drawn from `seeds[i]`.

    Every masked patch gets its own, and a document's are the same in whichever pack it lies.
    """
    generator = torch.Generator(like.device)
    draw = {"generator": generator, "device": like.device, "dtype": like.dtype}
    parts = [like.new_empty(0, like.shape[1])]
    for seed, count in zip(seeds.tolist(), patches.tolist(), strict=True):
        if count:
            generator.manual_seed(seed)
            parts.append(torch.randn(count, like.shape[1], **draw))
    return torch.cat(parts)
