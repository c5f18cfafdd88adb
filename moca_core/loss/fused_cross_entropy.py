r"""Cross-entropy of a linear head, fused: the logits of all rows never stand in memory.

    L = sum_r ( log sum_v exp(w_v . h_r) - w_{y_r} . h_r )

The gradients need the same softmax as the loss, so they are made with it, chunk by chunk, in the forward pass; nothing is computed
twice. Memory beyond the gradients themselves: one chunk of logits.
"""

import torch
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**28  # at a vocabulary of 152,000 these are 1,766 rows, one gigabyte in float32


def linear_cross_entropy(hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over rows of -log p(target), float32: hidden_states [M, D], weight [V, D], targets [M]. M may be 0.

    Softmax and sums are in float32 whatever the inputs are. Differentiable once, by hidden_states and weight.
    """
    return _LinearCrossEntropy.apply(hidden_states, weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, targets):
        chunk_rows = max(1, CHUNK_LOGITS // len(weight))
        by_hidden, by_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden_states) if by_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if by_weight else None
        loss = hidden_states.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets), chunk_rows):
            rows, wanted = hidden_states[start : start + chunk_rows], targets[start : start + chunk_rows, None]
            logits = (rows @ weight.T).float()
            log_sum = logits.logsumexp(1, keepdim=True)
            loss += (log_sum - logits.gather(1, wanted)).sum()
            if not (by_hidden or by_weight):
                continue
            error = logits.sub_(log_sum).exp_()  # softmax, then minus one at the target
            error.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=error.dtype))
            error = error.to(weight.dtype)
            if by_hidden:
                torch.mm(error, weight, out=hidden_grad[start : start + chunk_rows])
            if by_weight and weight.dtype == torch.float32:
                weight_grad.addmm_(error.T, rows)
            elif by_weight:
                weight_grad += error.T @ rows
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors), None
