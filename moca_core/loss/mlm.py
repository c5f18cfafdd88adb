r"""Masked language modelling.

    L_MLM = - sum over masked i of log p(x_i | h_{i-1})        (paper, Eq. 1)

The hidden state before a masked token predicts it, as in the causal pre-training that the head comes from. `shift=False` reads h_i
instead, the form of the authors' released code.
"""

import torch
from torch.nn.functional import cross_entropy

from moca_core.loss import LossTerm


def mlm_loss(
    hidden_states: torch.Tensor, labels: torch.Tensor, head: torch.nn.Module, *, shift: bool = True
) -> LossTerm:
    """Sum of -log p over labelled tokens, and their number.

    Args:
        hidden_states: [T, D]. labels: [T], the id at labelled positions and -100 elsewhere; with `shift` never at the
        first token of a sequence. head: hidden states to logits over the vocabulary; only labelled rows reach it.
    """
    positions = torch.nonzero(labels >= 0).squeeze(1)
    logits = head(hidden_states[positions - 1 if shift else positions])
    return LossTerm(cross_entropy(logits.float(), labels[positions], reduction="sum"), len(positions))
