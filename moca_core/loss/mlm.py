r"""Masked language modelling.

    L_MLM = - sum over masked i of log p(x_i | h_{i-1})        (paper, Eq. 1)

The hidden state before a masked token predicts it, as in the causal pre-training that the head comes from. `shift=False` reads h_i
instead, the form of the authors' released code.
"""

import torch
from torch import nn

from moca_core.loss import LossTerm
from moca_core.loss.fused_cross_entropy import linear_cross_entropy


class LanguageHead(nn.Module):
    """A language head that gives the loss, or a few guesses, and never the logits. It holds the weight of the given head, under the
    same name."""

    def __init__(self, lm_head: nn.Linear) -> None:
        super().__init__()
        assert lm_head.bias is None, "a language head with a bias has another loss"
        self.weight = lm_head.weight  # [V, D]

    def forward(
        self, hidden_states: torch.Tensor, targets: torch.Tensor | None, *, guesses: int = 0
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Sum of -log p(target): [M, D] and [M] to a scalar. Without targets the `guesses` most probable tokens of every row and
        their probabilities, [M, guesses] each."""
        if targets is None:
            probabilities, tokens = (hidden_states @ self.weight.T).float().softmax(1).topk(guesses)
            return tokens, probabilities
        return linear_cross_entropy(hidden_states, self.weight, targets)


def mlm_loss(
    hidden_states: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, head: LanguageHead, *, shift: bool
) -> LossTerm:
    """Sum of -log p over masked tokens, and their number.

    Args:
        hidden_states: [T, D]. positions: [M], where the masked tokens stand; with `shift` never at the first token of a
        sequence. targets: [M], what stood there. Only these rows reach the head.
    """
    rows = hidden_states.index_select(0, positions - 1 if shift else positions)
    return LossTerm(head(rows, targets), len(targets))
