r"""Masked autoencoding.

L_MAE = 1/|M| sum over masked patches j of || x_j - d(h)_j ||^2 / dim(x_j)        (paper, Eq. 2)
"""

import torch

from moca_core.loss import LossTerm


def mae_loss(painted: torch.Tensor, target: torch.Tensor, *, normalise_patches: bool = False) -> LossTerm:
    """Sum over masked patches of the mean squared error of one patch, and their number.

    Args:
        painted, target: [masked patches, patch values]. normalise_patches: compare with the target minus its mean over its
        deviation, patch by patch (MAE, arXiv 2111.06377, section 3): contrast instead of brightness.
    """
    target = target.float()
    if normalise_patches and len(target):
        mean, deviation = _contrast(target)
        target = (target - mean) / deviation
    return LossTerm((painted.float() - target).square().mean(dim=1).sum(), len(target))


def painted_values(painted: torch.Tensor, target: torch.Tensor, *, normalise_patches: bool = False) -> torch.Tensor:
    """What was painted, in the units of `target`: patches in units of their own contrast get that of the target back."""
    if not (normalise_patches and len(target)):
        return painted.float()
    mean, deviation = _contrast(target.float())
    return painted.float() * deviation + mean


def _contrast(target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of every patch, [masked patches, 1] each."""
    variance, mean = torch.var_mean(target, dim=1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()
