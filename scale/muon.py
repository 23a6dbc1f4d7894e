"""Muon (Jordan et al., 2024) as torch.optim has it, but with products in float32 on a CPU.

torch's own computes them in bfloat16, which a CPU without instructions for it (AVX2 alone, as most laptops
have) emulates: 70% of the time of a pretraining step of the tiny Qwen3 went there.
"""

import math
from collections.abc import Callable, Iterable

import torch


def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(m, n) -> (m, n): about U V^T of its singular value decomposition, singular values 0.7 to 1.2.

    Newton-Schulz: each step takes X to aX + b(XX^T)X + c(XX^T)^2 X, whose coefficients lift small singular
    values as fast as can be. In bfloat16 on a GPU, in float32 elsewhere.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(torch.bfloat16 if matrix.device.type == "cuda" else torch.float32)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T  # the smaller side's products are the cheaper ones
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Muon(torch.optim.Muon):
    """torch.optim.Muon with `orthogonalise` above; the update's size is that of AdamW ("match_rms_adamw")."""

    def __init__(self, params: Iterable, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(average, group["momentum"]))  # Nesterov's
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))
