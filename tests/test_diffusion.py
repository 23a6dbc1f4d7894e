"""diffusion.py: the schedule against its formula, the samplers against an oracle and the textbook."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusion import PREDICTIONS, Diffusion, T, cosine_alpha_bar, guide, sample, timesteps

SHAPE = (4, 4, 8, 8)  # (M, C, h, w)


def normal(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def oracle(diffusion: Diffusion, x0: Tensor, error: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """A network that knows x_0; its noise is off by `error` standard deviations, anew at every call."""
    g = torch.Generator().manual_seed(99)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        ab = diffusion.alpha_bar[t].view(-1, 1, 1, 1)
        eps = (x - ab.sqrt() * x0) / (1 - ab).sqrt()
        return (eps + error * torch.randn(x.shape, generator=g, dtype=torch.float64)).to(x)

    return predict


# ---- the schedule ----


def f(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def test_alpha_bar_is_the_closed_form_wherever_beta_is_not_clipped():
    alpha_bar = cosine_alpha_bar()
    assert alpha_bar.shape == (T,) and alpha_bar.dtype == torch.float64
    clipped = [t for t in range(T) if 1 - f((t + 1) / T) / f(t / T) > 0.999]
    assert clipped == [T - 1]
    expected = torch.tensor([f((t + 1) / T) / f(0) for t in range(T - 1)], dtype=torch.float64)
    torch.testing.assert_close(alpha_bar[:-1], expected, rtol=1e-9, atol=0)


def test_last_beta_is_clipped_so_the_last_level_is_2e_9_and_not_0():
    alpha_bar = cosine_alpha_bar()
    assert alpha_bar[-1].item() == pytest.approx(0.001 * f(0.999) / f(0), rel=1e-9)
    assert alpha_bar[-1].item() == pytest.approx(2.4e-9, rel=0.02)


def test_clip_and_offset_are_arguments():
    clipped = cosine_alpha_bar(steps=10, max_beta=0.3)
    assert len(clipped) == 10 and (clipped[-1] / clipped[-2]).item() == pytest.approx(0.7)
    assert cosine_alpha_bar(s=0.1)[0] < cosine_alpha_bar(s=0.008)[0]  # s makes the first beta larger


def test_alpha_bar_falls_at_every_step_and_stays_between_0_and_1():
    for shift in (0.5, 1.0, 2.0):
        alpha_bar = cosine_alpha_bar(shift=shift)
        assert (alpha_bar.diff() < 0).all() and (alpha_bar > 0).all() and (alpha_bar < 1).all()


@pytest.mark.parametrize("shift", [0.5, 2.0, 3.0])
def test_shift_divides_the_signal_to_noise_ratio_by_its_square(shift):
    plain, shifted = cosine_alpha_bar(), cosine_alpha_bar(shift=shift)
    assert torch.equal(Diffusion(shift=shift).alpha_bar, shifted)
    torch.testing.assert_close(shifted / (1 - shifted), plain / (1 - plain) / shift**2, rtol=1e-9, atol=0)


# ---- noising and the loss ----


def test_x_0_comes_back_from_x_t_and_the_true_noise_at_every_timestep():
    diffusion, t = Diffusion(), torch.arange(T)
    x0, eps = normal(0, (T, 2, 3, 3)), normal(1, (T, 2, 3, 3))
    x_t = diffusion.q_sample(x0, t, eps)
    ab = diffusion.alpha_bar.view(-1, 1, 1, 1)
    back = (x_t - (1 - ab).sqrt() * eps) / ab.sqrt()
    torch.testing.assert_close(back, x0, rtol=0, atol=1e-9)


def test_noising_keeps_unit_variance_and_uses_each_images_own_timestep():
    diffusion, t = Diffusion(), torch.tensor([0, 300, 700, 999])
    x0, eps = normal(0, (4, 4, 64, 64)), normal(1, (4, 4, 64, 64))
    x_t = diffusion.q_sample(x0, t, eps)
    assert x_t.flatten(1).std(1).sub(1).abs().max() < 0.02
    likeness = (x_t * x0).flatten(1).mean(1)  # sqrt(alpha_bar_t)
    torch.testing.assert_close(likeness, diffusion.alpha_bar[t].sqrt(), rtol=0, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noising_keeps_the_dtype_of_the_latents(dtype):
    x0, eps = normal(0).to(dtype), normal(1).to(dtype)
    assert Diffusion().q_sample(x0, torch.tensor([0, 10, 500, 999]), eps).dtype == dtype


def test_output_is_the_noise_itself_with_prediction_eps():
    output = normal(2)
    assert torch.equal(
        Diffusion().eps_from_output(output, normal(0), torch.tensor([0, 10, 500, 999])), output
    )


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_true_v_gives_the_true_noise_with_prediction_v(shift):
    diffusion, t = Diffusion(shift, prediction="v"), torch.tensor([0, 300, 700, 999])
    x0, eps = normal(0), normal(1)
    ab = diffusion.alpha_bar[t].view(-1, 1, 1, 1)
    v = ab.sqrt() * eps - (1 - ab).sqrt() * x0  # Salimans & Ho (2022)
    torch.testing.assert_close(diffusion.eps_from_output(v, diffusion.q_sample(x0, t, eps), t), eps)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_loss_weighted_v_is_the_squared_error_of_v(shift):
    diffusion, t = Diffusion(shift, prediction="v"), torch.tensor([0, 300, 700, 999])
    x0, eps, output = normal(0), normal(1), normal(2)
    ab = diffusion.alpha_bar[t].view(-1, 1, 1, 1)
    v = ab.sqrt() * eps - (1 - ab).sqrt() * x0
    eps_pred = diffusion.eps_from_output(output, diffusion.q_sample(x0, t, eps), t)
    loss = diffusion.loss(eps_pred, eps, t, weighting="v")
    torch.testing.assert_close(loss, (output - v).square().mean().float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_true_x_gives_the_true_noise_and_its_error_weighs_five_times_at_most_with_prediction_x(shift):
    diffusion, t = Diffusion(shift, prediction="x"), torch.tensor([0, 300, 700, 999])
    x0, eps, output = normal(0), normal(1), normal(2)
    x_t = diffusion.q_sample(x0, t, eps)
    torch.testing.assert_close(diffusion.eps_from_output(x0, x_t, t), eps)
    loss = diffusion.loss(diffusion.eps_from_output(output, x_t, t), eps, t, weighting="x")
    weight = (1 / (1 - diffusion.alpha_bar[t])).clamp(max=5.0)
    assert weight[0] == 5 > weight[2] > weight[3]
    wanted = (weight * (output - x0).square().mean((1, 2, 3))).mean().item()
    assert loss.item() == pytest.approx(wanted, rel=1e-3)  # t = 999: see below


def test_loss_weighted_v_holds_in_float32_up_to_the_last_timestep():
    """Where alpha_bar is 2e-9, the difference of two noises is divided by 5e-5; three digits survive."""
    diffusion, t = Diffusion(prediction="v"), torch.full((4,), 999)
    x0, eps, output = normal(0).float(), normal(1).float(), normal(2).float()
    eps_pred = diffusion.eps_from_output(output, diffusion.q_sample(x0, t, eps), t)
    v = diffusion.alpha_bar[999].sqrt().float() * eps - x0
    expected = (output - v).square().mean().item()
    assert diffusion.loss(eps_pred, eps, t, weighting="v").item() == pytest.approx(expected, rel=1e-3)


def test_a_bfloat16_network_leaves_the_noise_in_float32():
    """In bfloat16, x_t alone would be off by more than sqrt(alpha_bar) F at the noisiest timesteps."""
    diffusion, t = Diffusion(shift=2.0, prediction="v"), torch.full((4,), 990)
    x0, eps, output = normal(0).float(), normal(1).float(), normal(2).bfloat16()
    x_t = diffusion.q_sample(x0, t, eps)
    eps_pred = diffusion.eps_from_output(output, x_t, t)
    assert eps_pred.dtype == torch.float32
    torch.testing.assert_close(eps_pred, diffusion.eps_from_output(output.float(), x_t, t))


def test_plain_loss_is_the_mean_squared_error_of_the_noise_whatever_the_timestep():
    eps, eps_pred, t = normal(0), normal(1), torch.tensor([0, 300, 700, 999])
    for prediction in PREDICTIONS:
        loss = Diffusion(prediction=prediction).loss(eps_pred, eps, t)
        torch.testing.assert_close(loss, (eps - eps_pred).square().mean().float())


# ---- the samplers ----


@pytest.mark.parametrize("steps", [10, 50, 250])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_samplers_recover_x_0_from_a_network_that_knows_it(steps, sampler, shift):
    diffusion, x0 = Diffusion(shift), normal(0)
    for bound in (None, x0.abs().max().item()):
        x = sample(diffusion, oracle(diffusion, x0), normal(1), steps, sampler, bound, generators(0, 1, 2, 3))
        torch.testing.assert_close(x, x0, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bound", [None, 3.0])
@pytest.mark.parametrize("steps", [10, 50, 250])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_state_stays_within_five_deviations_when_the_noise_is_off_by_a_tenth(bound, steps, sampler, shift):
    diffusion, x0, states = Diffusion(shift), normal(0).clamp(-3, 3).float(), []
    predict = oracle(diffusion, x0, error=0.1)
    sample(
        diffusion, predict, normal(1).float(), steps, sampler, bound, generators(0, 1, 2, 3), states.append
    )
    assert len(states) == steps
    assert max(x.abs().max() for x in states) < 5
    assert max(x.std() for x in states) < 1.25


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_one_step_never_multiplies_an_error_of_the_noise_by_more_than_five(shift):
    """d x_next / d eps of DDIM, below 500 steps; from there on, t = 999 itself takes part."""
    ab = cosine_alpha_bar(shift=shift)
    for steps in (1, 2, 3, 5, 10, 20, 25, 50, 100, 250, 333, 499):
        levels = torch.cat((ab[timesteps(steps)], torch.ones(1, dtype=torch.float64)))
        a, b = levels[:-1], levels[1:]
        assert ((1 - b).sqrt() - (b / a * (1 - a)).sqrt()).abs().max() < 5, steps


def test_bound_tames_a_start_at_the_last_timestep():
    diffusion, x, eps = Diffusion(), normal(1), normal(1) + 0.1 * normal(2)
    free = diffusion.step(x, eps, 999, 995, eta=0.0, bound=None)
    held = diffusion.step(x, eps, 999, 995, eta=0.0, bound=3.0)
    assert free.std() > 10 and held.std() < 1.1


def test_bound_clamps_each_channel_of_the_estimate_to_its_own_range():
    bound = torch.tensor([0.5, 1.0, 2.0, 4.0]).view(4, 1, 1)
    x = Diffusion().step(normal(0), normal(1), 900, None, eta=0.0, bound=bound)
    largest = x.abs().amax((0, 2, 3))
    torch.testing.assert_close(largest, bound.flatten().double())


def test_bound_makes_the_noise_agree_with_the_clamped_estimate():
    """Song et al. (2021), Eq. (12): sqrt(ab) x_0 + sqrt(1 - ab) eps = x_t still holds."""
    diffusion, x, eps = Diffusion(), normal(0), normal(1)
    a, b = diffusion.alpha_bar[900].item(), diffusion.alpha_bar[800].item()
    x0 = ((x - math.sqrt(1 - a) * eps) / math.sqrt(a)).clamp(-1, 1)
    noise = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
    expected = math.sqrt(b) * x0 + math.sqrt(1 - b) * noise
    torch.testing.assert_close(diffusion.step(x, eps, 900, 800, eta=0.0, bound=1.0), expected)


@pytest.mark.parametrize("t", [1, 2, 500, 998, 999])
def test_ddpm_step_is_the_textbook_posterior(t):
    """q(x_{t-1} | x_t, x_0) of Ho et al. (2020), Eq. (7), from the betas, in Python floats."""
    diffusion, x_t, x0 = Diffusion(), normal(0), normal(1)
    product, betas = 1.0, []
    for i in range(t + 1):
        betas.append(min(1 - f((i + 1) / T) / f(i / T), 0.999))
        before, product = product, product * (1 - betas[-1])
    beta, alpha = betas[t], 1 - betas[t]
    mean = (math.sqrt(before) * beta * x0 + math.sqrt(alpha) * (1 - before) * x_t) / (1 - product)
    variance = (1 - before) / (1 - product) * beta
    eps = (x_t - math.sqrt(product) * x0) / math.sqrt(1 - product)
    center = diffusion.step(x_t, eps, t, t - 1, eta=1.0, bound=None, noise=torch.zeros_like(x_t))
    off = diffusion.step(x_t, eps, t, t - 1, eta=1.0, bound=None, noise=torch.ones_like(x_t))
    torch.testing.assert_close(center, mean, rtol=0, atol=1e-7)
    torch.testing.assert_close((off - center).square(), torch.full_like(x_t, variance), rtol=1e-6, atol=0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_lands_on_the_marginal_of_its_level(eta):
    """From x_t ~ q(x_t | x_0) and the true noise, x_next ~ q(x_next | x_0) for any jump."""
    diffusion, eps = Diffusion(), normal(1, (1, 1, 300, 300))
    x0 = torch.full_like(eps, 0.7)
    for t, t_next in ((998, 700), (700, 300), (300, 20)):
        x_t = diffusion.q_sample(x0, torch.tensor([t]), eps)
        x = diffusion.step(x_t, eps, t, t_next, eta, None, normal(2, (1, 1, 300, 300)))
        ab = diffusion.alpha_bar[t_next].item()
        assert x.mean().item() == pytest.approx(0.7 * math.sqrt(ab), abs=0.015)
        assert x.std().item() == pytest.approx(math.sqrt(1 - ab), rel=0.01)


def test_no_noise_is_added_at_the_last_step():
    diffusion, x, eps = Diffusion(), normal(0), normal(1)
    for t in (0, 2, 500):
        a = diffusion.alpha_bar[t].item()
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        for noise in (normal(2), normal(3), None):
            torch.testing.assert_close(diffusion.step(x, eps, t, None, 1.0, None, noise), x0)

    def run(steps: int, *seeds: int) -> Tensor:
        return sample(diffusion, lambda x, t: 0.5 * x, normal(0), steps, "ddpm", None, generators(*seeds))

    assert torch.equal(run(1, 0, 1, 2, 3), run(1, 4, 5, 6, 7))
    assert not torch.equal(run(2, 0, 1, 2, 3), run(2, 4, 5, 6, 7))  # at the first of two steps, noise matters


def test_ddim_needs_no_generators_and_ddpm_draws_from_them():
    diffusion, x0 = Diffusion(), normal(0)
    predict = oracle(diffusion, x0)
    states: list[list[Tensor]] = [[], [], []]
    sample(diffusion, predict, normal(1), 10, "ddim", None, None, states[0].append)
    sample(diffusion, predict, normal(1), 10, "ddim", None, generators(0, 1, 2, 3), states[1].append)
    sample(diffusion, predict, normal(1), 10, "ddpm", None, generators(0, 1, 2, 3), states[2].append)
    assert torch.equal(states[0][4], states[1][4]) and not torch.equal(states[0][4], states[2][4])


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddpm", 1.0)])
def test_a_sampler_is_a_chain_of_steps_of_its_eta_within_the_bound(sampler, eta):
    diffusion, x, times = Diffusion(), normal(0), timesteps(6)
    images, expected = generators(0, 1, 2, 3), x
    for t, t_next in zip(times, [*times[1:], None], strict=True):
        noise = torch.stack([torch.randn(SHAPE[1:], generator=g) for g in images]).double()
        expected = diffusion.step(expected, 0.5 * expected, t, t_next, eta, 0.8, noise)
    assert torch.equal(
        sample(diffusion, lambda x, t: 0.5 * x, x, 6, sampler, 0.8, generators(0, 1, 2, 3)), expected
    )


def test_network_is_asked_at_the_timesteps_in_order_and_for_every_image():
    asked = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t.tolist())
        return 0.5 * x

    sample(Diffusion(), predict, normal(0), 7, "ddim")
    assert asked == [[t] * 4 for t in timesteps(7)]


def test_same_generators_give_the_same_sample_and_others_another():
    def run(*seeds: int) -> Tensor:
        return sample(Diffusion(), lambda x, t: 0.9 * x, normal(0), 10, "ddpm", 3.0, generators(*seeds))

    assert torch.equal(run(0, 1, 2, 3), run(0, 1, 2, 3))
    assert (run(0, 1, 2, 3) != run(4, 5, 6, 7)).flatten(1).any(1).all()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_an_images_noise_depends_on_its_own_generator_alone(sampler):
    def run(noise: Tensor, *seeds: int) -> Tensor:
        return sample(Diffusion(), lambda x, t: 0.9 * x, noise, 10, sampler, 3.0, generators(*seeds))

    noise = normal(0)[:2]
    both = run(noise, 5, 6)
    assert torch.equal(both[:1], run(noise[:1], 5)) and torch.equal(both[1:], run(noise[1:], 6))
    assert torch.equal(both[:1], run(noise, 5, 7)[:1])


def test_sampling_changes_neither_the_noise_nor_an_estimate_in_place():
    noise = normal(0)
    before = noise.clone()
    sample(Diffusion(), lambda x, t: x, noise, 5, "ddpm", 1.0, generators(0, 1, 2, 3))  # eps is x itself
    assert torch.equal(noise, before)


# ---- timesteps and guidance ----


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 25, 50, 250, 333, 500, 999, 1000])
def test_timesteps_fall_strictly_and_are_the_middles_of_equal_parts(steps):
    times = timesteps(steps)
    assert len(times) == steps and all(type(t) is int for t in times)
    assert all(a > b for a, b in zip(times[:-1], times[1:], strict=True))
    assert 0 <= times[-1] and times[0] < T
    middles = [(i + 0.5) * T / steps for i in reversed(range(steps))]
    assert all(abs(t - m) <= 1 for t, m in zip(times, middles, strict=True))


def test_a_thousand_steps_visit_every_timestep():
    assert timesteps(T) == list(reversed(range(T)))


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match=rf"1 to 1000, not {steps}"):
        timesteps(steps)
    with pytest.raises(ValueError, match=rf"1 to 1000, not {steps}"):
        sample(Diffusion(), lambda x, t: x, normal(0), steps)


def test_guidance_is_the_conditional_at_1_and_the_unconditional_at_0():
    conditional, unconditional = normal(0), normal(1)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), unconditional)


def test_guidance_acts_on_every_channel_alike():
    conditional, unconditional = normal(0, (2, 16, 4, 4)), normal(1, (2, 16, 4, 4))
    moved = guide(conditional, unconditional, 3.5) - unconditional
    torch.testing.assert_close(moved, 3.5 * (conditional - unconditional))


# ---- mistakes ----


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="'x0'.*eps, v, x"):
        Diffusion(prediction="x0")
    with pytest.raises(ValueError, match="'euler'.*ddim, dpm, ddpm"):
        sample(Diffusion(), lambda x, t: x, normal(0), 5, sampler="euler")


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_a_shift_that_is_not_positive_is_refused(shift):
    with pytest.raises(ValueError, match="schedule_shift"):
        Diffusion(shift=shift)


def test_twelve_steps_of_the_second_order_are_nearer_to_the_path_than_25_of_ddim():
    """Of numbers of one standard deviation s everything is known: eps, and the noise-free path."""
    diffusion, s, noise = Diffusion(shift=2.0), 0.3, normal(0)

    def scale(t: int | Tensor) -> Tensor:
        a = diffusion.alpha_bar[t]
        return (a * s**2 + 1 - a).sqrt()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return ((1 - diffusion.alpha_bar[t]).sqrt() / scale(t) ** 2).view(-1, 1, 1, 1) * x

    def off(sampler: str, steps: int) -> float:
        """Where the last step begins: that one is of first order in all of them."""
        states, times = [], timesteps(steps)
        sample(diffusion, predict, noise, steps, sampler, watch=states.append)
        return (states[-2] / noise * scale(times[0]) / scale(times[-1]) - 1).abs().max().item()

    assert off("dpm", 12) < 0.2 * off("ddim", 12) and off("dpm", 12) < 0.5 * off("ddim", 25)
    two = [sample(diffusion, predict, noise, 2, sampler) for sampler in ("dpm", "ddim")]
    torch.testing.assert_close(*two)  # neither the first step nor the last has a line to follow
