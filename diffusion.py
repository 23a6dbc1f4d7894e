"""DDPM with a cosine schedule (Section 2.2), samplers, and classifier-free guidance.

    noising    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps                      Eq. (2)
    training   || eps - eps_theta(x_t, t, context) ||^2                                     Eq. (3)
    guidance   eps = eps_u + s (eps_c - eps_u), over all channels

Timesteps are integers 0 .. T-1; index t of `alpha_bar` is the noise level of x_t, and "no noise at all" is a
level of its own (alpha_bar = 1) that only the samplers' last step reaches.

Shapes: M images; x, eps, F are (M, C, h, w); t is (M,).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

T = 1000
SAMPLERS = ("ddim", "dpm", "ddpm")
PREDICTIONS = ("eps", "v", "x")
WEIGHTINGS = ("none", "v", "x")
MOST = 5.0  # that weighting "x" gives the squared error of x_0


def cosine_alpha_bar(steps: int = T, s: float = 0.008, max_beta: float = 0.999, shift: float = 1.0) -> Tensor:
    """alpha_bar (steps,), float64, of the cosine schedule of Nichol & Dhariwal (2021), Eq. (17).

    f(u) = cos^2((u + s) / (1 + s) * pi / 2), beta_t = 1 - f((t + 1) / T) / f(t / T) clipped at `max_beta`,
    and alpha_bar_t = prod(1 - beta). `shift` > 1 makes every timestep noisier, alpha_bar / (1 - alpha_bar)
    divided by shift^2 (Hoogeboom et al. 2023, "simple diffusion"); 1 is the paper's schedule.
    """
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=max_beta)
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    snr = alpha_bar / (1 - alpha_bar) / shift**2
    return snr / (1 + snr)


def extract(level: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """level[t] as (M, 1, 1, 1), in the dtype and on the device of `like`."""
    return level.to(like.dtype).to(like.device, non_blocking=True)[t].view(-1, *[1] * (like.dim() - 1))


class Diffusion:
    """A noise schedule, and what is done with it; `shift` as in `cosine_alpha_bar`.

    prediction = "eps": F is the noise itself (Eq. 14).
    prediction = "v":   eps = sqrt(1 - alpha_bar) x_t + sqrt(alpha_bar) F. Our choice, for small models: at
    high noise the network need not learn to copy its input to three digits before the prompt can matter. The
    loss stays one on eps; F is then what Salimans & Ho (2022) call v.
    prediction = "x":   eps = (x_t - sqrt(alpha_bar) F) / sqrt(1 - alpha_bar): F is x_0, the clean latent. Our
    choice, for small models again: noise has as many dimensions as the latent, pictures lie on a manifold of
    few, and a narrow network that must carry the noise to its output blurs them (Li & He 2025, "Back to
    basics": predict x, weigh its error as one of v).
    """

    def __init__(self, shift: float = 1.0, prediction: str = "eps"):
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {prediction!r}; choose {', '.join(PREDICTIONS)}")
        if not shift > 0:
            raise ValueError(f"schedule_shift is {shift}; it must be positive")
        self.alpha_bar = cosine_alpha_bar(shift=shift)  # (T,) float64
        self.prediction = prediction

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Eq. (2): the noisy latent."""
        a = extract(self.alpha_bar.sqrt(), t, x0)
        b = extract((1 - self.alpha_bar).sqrt(), t, x0)
        return a * x0 + b * eps

    def eps_from_output(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """UNet-Up's output F -> predicted noise."""
        if self.prediction == "eps":
            return output
        a = extract(self.alpha_bar.sqrt(), t, x_t)
        b = extract((1 - self.alpha_bar).sqrt(), t, x_t)
        return (x_t - a * output) / b if self.prediction == "x" else b * x_t + a * output

    def loss(self, eps_pred: Tensor, eps: Tensor, t: Tensor, weighting: str = "none") -> Tensor:
        """Eq. (3), a mean over images and elements; weighting "v" divides it by alpha_bar_t.

        That makes it the squared error of v, which is 1 / (1 - alpha_bar_t) times that of x_0. Weighting "x"
        is the same, but at most MOST times the error of x_0 (as in Min-SNR, Hang et al. 2023): else the last
        few timesteps would be most of the loss.
        """
        error = (eps - eps_pred).float().square().flatten(1).mean(1)  # (M,)
        if weighting != "none":
            alpha_bar = self.alpha_bar.float().to(error.device, non_blocking=True)[t]
            error = error / alpha_bar
            if weighting == "x":
                error = error * (MOST * (1 - alpha_bar)).clamp(max=1)
        return error.mean()

    # ---- sampling ----

    def estimate(self, x_t: Tensor, eps: Tensor, t: int, bound: Tensor | float | None) -> Tensor:
        """x_0, as far as x_t and the noise in it tell.

        `bound` (our choice): the estimate is clamped to [-bound, bound]. Without it an error of eps at
        t = 999 enters x_0 multiplied by 1 / sqrt(alpha_bar) = 20,000.
        """
        a_t = self.alpha_bar[t].item()
        x0 = (x_t - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
        if bound is not None:
            bound = torch.as_tensor(bound, dtype=x_t.dtype, device=x_t.device)
            x0 = x0.clamp(-bound, bound)
        return x0

    def noise_in(self, x_t: Tensor, x0: Tensor, t: int) -> Tensor:
        """eps, which x_t consists of beside x_0."""
        a_t = self.alpha_bar[t].item()
        return (x_t - math.sqrt(a_t) * x0) / math.sqrt(1 - a_t)

    def second_order(self, x0: Tensor, former: Tensor, times: tuple[int, int, int]) -> Tensor:
        """DPM-Solver++(2M) (Lu et al. 2022): with this x_0, a DDIM step is one of second order.

        x0 and former: estimates at this timestep and at the one before; times: that one, this and the next.
        It lies half a step ahead on the line through both, over half the logarithm of the SNR.
        """
        alpha_bar = self.alpha_bar[list(times)]
        before, now, after = (0.5 * torch.log(alpha_bar / (1 - alpha_bar))).tolist()
        return x0 + (x0 - former) * (after - now) / (2 * (now - before))

    def step(
        self,
        x_t: Tensor,
        eps: Tensor,
        t: int,
        t_next: int | None,
        eta: float,
        bound: Tensor | float | None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """x at level t -> at level t_next (None: noise-free). eta = 0 is DDIM, eta = 1 DDPM ancestral.

        With `bound`, the estimate of x_0 keeps to it, and eps is made to agree. Song et al. (2021), Eq. (12)
        and (16).
        """
        a_t = self.alpha_bar[t].item()
        a_next = 1.0 if t_next is None else self.alpha_bar[t_next].item()
        x0 = self.estimate(x_t, eps, t, bound)
        if bound is not None:
            eps = self.noise_in(x_t, x0, t)
        # 0 at the last step: no noise there
        sigma = eta * math.sqrt((1 - a_next) / (1 - a_t) * (1 - a_t / a_next))
        x = math.sqrt(a_next) * x0 + math.sqrt(max(1 - a_next - sigma**2, 0.0)) * eps
        return x if sigma == 0.0 else x + sigma * noise


def timesteps(steps: int) -> list[int]:
    """`steps` timesteps from noisy to clean: the middles of equal parts of the levels 1/T .. 1.

    Our choice: starting at t = 999, where alpha_bar is 2.4e-9, the first of 250 steps multiplies an error of
    eps by 122; from the middle of the first interval, by 2. (Index t has the level (t + 1) / T.)
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be from 1 to {T}, not {steps}")
    return [math.ceil((i + 0.5) * T / steps) - 1 for i in reversed(range(steps))]


def guide(eps_cond: Tensor, eps_uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance over every channel; scale 1 is the conditional prediction."""
    return eps_uncond + scale * (eps_cond - eps_uncond)


def sample(
    diffusion: Diffusion,
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    steps: int,
    sampler: str = "ddim",
    bound: Tensor | float | None = None,
    generators: list[torch.Generator] | None = None,
    watch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Denoise `noise` (M, C, h, w) in `steps` steps with predict(x_t, t) -> eps; returns x_0.

    sampler: "ddpm" (ancestral; one generator an image draws its noise), "ddim" (deterministic), or "dpm"
    (DPM-Solver++(2M), deterministic and of second order: fewer steps).
    watch(x_t): called after every step, for progress bars and films.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; choose {', '.join(SAMPLERS)}")
    if sampler == "ddpm" and (generators is None or len(generators) != len(noise)):
        raise ValueError(f"ddpm needs one generator for each of the {len(noise)} images")
    x, times, former = noise, timesteps(steps), None
    for i, t in enumerate(times):
        eps = predict(x, torch.full((len(x),), t, device=x.device))
        fresh = None
        if sampler == "ddpm":
            fresh = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)
        t_next = times[i + 1] if i + 1 < len(times) else None
        if sampler == "dpm":
            x0 = diffusion.estimate(x, eps, t, bound)
            if i and t_next is not None:
                ahead = diffusion.second_order(x0, former, (times[i - 1], t, t_next))
                eps = diffusion.noise_in(x, ahead, t)
            former = x0
        x = diffusion.step(x, eps, t, t_next, eta=float(sampler == "ddpm"), bound=bound, noise=fresh)
        if watch is not None:
            watch(x)
    return x
