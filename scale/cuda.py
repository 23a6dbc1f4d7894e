"""What attention.py needs to be fast on a GPU, and nothing that changes a result.

Shapes: as in attention.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

if TYPE_CHECKING:
    from attention import Tokens


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """x on a device. A copy to a GPU is from pinned memory and not waited for."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    with torch.cuda.device(device):  # a thread of its own would pin for the first one
        return x.pin_memory().to(device, non_blocking=True)


class Gather(torch.autograd.Function):
    """x (n, ...) -> its rows `index`, none of them twice.

    The gradient of torch's own `index_select` is added up row by row, for one may come twice: on a GPU with
    atomic additions. Here it is written.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, index, grad), None


def make_block_mask(query: Tokens, key: Tokens, device: torch.device) -> BlockMask:
    """`hybrid_mask` for FlexAttention, which skips the blocks in which nothing is seen."""
    q_image, q_position, q_document = (x.to(device) for x in (query.image, query.position, query.document))
    k_image, k_position, k_document = (x.to(device) for x in (key.image, key.position, key.document))

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same_image = (q_image[b, i] == k_image[b, j]) & (q_image[b, i] > 0)
        causal = k_position[b, j] <= q_position[b, i]
        return (q_document[b, i] == k_document[b, j]) & (causal | same_image)

    (B, N), S = query.document.shape, key.document.shape[1]
    return create_block_mask(sees, B, None, N, S, device=device)


@lru_cache
def compiled(function: Callable) -> Callable:
    """A function whose chains of elementwise work become one kernel each, for any number of tokens."""
    torch._dynamo.config.recompile_limit = 64  # text and images, with gradients and without, one token, many
    return torch.compile(function, dynamic=True)
