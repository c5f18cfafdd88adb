"""A packed stream on the training device: pixels normalised, noised and copied in time here, not on the CPU workers."""

from dataclasses import dataclass

import torch

from moca_core.spec import BackboneSpec
from moca_core.types import TokenStream


@dataclass
class DeviceStream:
    """TokenStream as tensors. `pixel_values` [P, C * temporal * patch²] are normalised floats in the processor's layout."""

    input_ids: torch.Tensor  # [T]
    cu_seqlens: torch.Tensor  # [S+1] int32
    max_seqlen: int
    position_ids: torch.Tensor  # [4, T]
    pixel_values: torch.Tensor  # [P, channels * temporal_patch_size * patch²]
    grid_thw: torch.Tensor  # [N, 3]

    @property
    def lengths(self) -> torch.Tensor:
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]


def to_device(stream: TokenStream, spec: BackboneSpec, device: torch.device) -> DeviceStream:
    def move(array):
        return torch.from_numpy(array).to(device, non_blocking=True)

    return DeviceStream(
        input_ids=move(stream.input_ids),
        cu_seqlens=move(stream.cu_seqlens),
        max_seqlen=int((stream.cu_seqlens[1:] - stream.cu_seqlens[:-1]).max()),
        position_ids=move(stream.position_ids),
        pixel_values=repeat_in_time(normalise(move(stream.pixels), spec), spec),
        grid_thw=move(stream.grid_thw),
    )


def normalise(pixels: torch.Tensor, spec: BackboneSpec) -> torch.Tensor:
    """uint8 patches [P, C * patch²] to float32, with the processor's mean and deviation per channel."""
    values = pixels.view(len(pixels), spec.channels, spec.patch_size_px**2).float() / 255
    mean, std = (torch.tensor(x, device=pixels.device)[:, None] for x in (spec.image_mean, spec.image_std))
    return ((values - mean) / std).flatten(1)


def repeat_in_time(values: torch.Tensor, spec: BackboneSpec) -> torch.Tensor:
    """[P, C * patch²] to [P, C * temporal * patch²]: a still image is the same frame at every step of a temporal patch."""
    frames = values.view(len(values), spec.channels, 1, spec.patch_size_px**2)
    return frames.expand(-1, -1, spec.temporal_patch_size, -1).flatten(1)


def first_frame(values: torch.Tensor, spec: BackboneSpec) -> torch.Tensor:
    """The inverse of `repeat_in_time`."""
    return values.view(len(values), spec.channels, spec.temporal_patch_size, spec.patch_size_px**2)[:, :, 0].flatten(1)


def add_noise(values: torch.Tensor, masked_groups: torch.Tensor, seed: int, spec: BackboneSpec) -> torch.Tensor:
    """Replaces all patches of the masked groups by independent unit Gaussian noise (paper, section 3.1)."""
    generator = torch.Generator(values.device).manual_seed(seed)
    noise = torch.randn(values.shape, generator=generator, device=values.device, dtype=values.dtype)
    return torch.where(masked_groups.repeat_interleave(spec.group_size)[:, None], noise, values)
