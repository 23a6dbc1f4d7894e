"""muon.py: orthogonalised updates, against the singular value decomposition and against torch's optimizer."""

from __future__ import annotations

import pytest
import torch

from scale.muon import Muon, orthogonalise

SHAPES = ((8, 8), (8, 20), (20, 8), (1, 6), (6, 1))


def five_steps(value: torch.Tensor) -> torch.Tensor:
    """What Newton-Schulz makes of a singular value."""
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    return value


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", (1e-3, 1.0, 1e4))
def test_singular_vectors_stay_and_singular_values_come_near_one(shape, scale):
    """In float64 the iteration is the same polynomial of every singular value."""
    matrix = scale * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    want = u @ torch.diag(five_steps(s / s.norm())) @ v
    found = orthogonalise(matrix)
    assert found.dtype == torch.float32 and found.shape == shape
    assert (found - want).abs().max() < 2e-5
    assert torch.linalg.svdvals(found).max() < 1.25


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonalise(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_steps_are_those_of_torch_but_for_its_rounding():
    """Ten steps with decay and a changing rate: torch's products are in bfloat16 (8 bits)."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES[:3]]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    one = Muon(ours, lr=0.02, weight_decay=0.1)
    two = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    assert one.state_dict() == two.state_dict()  # the same settings, before there is a state
    for step in range(10):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in (one, two):
            optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
            optimizer.step()
    for a, b, p in zip(ours, theirs, start, strict=True):
        moved, apart = (b - p).norm(), (a - b).norm()
        assert 0 < apart < 0.01 * moved
    kept = [s["momentum_buffer"] for s in one.state.values()]
    assert all(map(torch.equal, kept, [s["momentum_buffer"] for s in two.state.values()]))


def test_a_matrix_without_a_gradient_is_left_alone():
    one, other = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    one.grad = torch.ones(2, 2)
    optimizer = Muon([one, other], lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(other, torch.ones(2, 2)) and not torch.equal(one, other)
    assert list(optimizer.state) == [one]
