"""The budget against real models, tiny ones for what is exact and one of 0.1B for what a process takes."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from conftest import TINY
from torch.utils.flop_counter import FlopCounterMode

import train
from data import CAPTION_DROPPED, CAPTION_FIRST, IMAGE_FIRST, caption_document, collate
from load_qwen3 import known_config
from model import ModelConfig
from scale import budget

CAPTION = 5
FIXED = train.TrainConfig(batch_size=4, unet_channels=(16, 32), optimizer="adamw")
assert FIXED.diffusion is FIXED.diffusion  # made once, here: its table belongs to no books


def with_fields(config: train.TrainConfig, **changes) -> train.TrainConfig:
    """`dataclasses.replace`, also for fields that this version of TrainConfig may lack."""
    known = {f.name for f in dataclasses.fields(config)}
    out = dataclasses.replace(config, **{k: v for k, v in changes.items() if k in known})
    for name in set(changes) - known:
        object.__setattr__(out, name, changes[name])
    return out


STEP = budget.TrainingStep(train.step_loss, train.make_optimizers)


def arrange(captions: list[list[int]], latents: torch.Tensor, orders: list[str], config: ModelConfig):
    """A batch of captioned pictures."""
    rows = zip(captions, orders, strict=True)
    return collate([caption_document(None, *row, config) for row in rows], latents, config)


def real_step(model, config: train.TrainConfig, batch) -> tuple[list, torch.Tensor]:
    """One step of training with gradients kept."""
    loss = train.step_loss(model, batch, config)
    loss.backward()
    optimizers = train.make_optimizers(model, config)
    for optimizer in optimizers:
        optimizer.step()
    return optimizers, loss


@pytest.mark.parametrize("separation", ["deep", "shallow", "none"])
def test_parameters_are_those_of_a_real_model_and_shared_ones_count_once(make_model, separation):
    model = make_model(separation=separation)
    counted = budget.count_parameters(budget.Books().model(model.config, FIXED))
    assert counted["total"] == sum(p.numel() for p in model.parameters())
    assert counted["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted["text"] + counted["image_experts"] + counted["unet"] == counted["total"]
    expert = sum(p.numel() for p in model.layers[0].image.parameters()) * len(model.layers)
    if separation == "deep":
        assert counted["image_experts"] == expert + 2 * model.config.hidden_size
    if separation == "none":
        assert counted["image_experts"] == model.config.hidden_size  # the row for BOI


def test_the_unet_of_the_paper_has_0_27_billion_parameters_at_8B():
    counted = budget.count_parameters(
        budget.Books().model(known_config("Qwen/Qwen3-8B"), train.TrainConfig())
    )
    assert counted["unet"] == pytest.approx(0.2675e9, rel=1e-3)
    assert counted["text"] == pytest.approx(8.19e9, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_optimizer_have_the_bytes_of_a_real_step(make_model, optimizer):
    config = with_fields(FIXED, optimizer=optimizer, ema=0.9)
    model = make_model()
    latents = torch.randn(1, 4, 8, 8)
    optimizers, _ = real_step(model, config, arrange([[5] * CAPTION], latents, [IMAGE_FIRST], model.config))
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [x for o in optimizers for s in o.state.values() for x in s.values() if x.dim()]
    predicted = budget.training_bytes(model.config, config, STEP, 1, CAPTION)
    weights = sum(p.nbytes for p in model.parameters())
    assert predicted["frozen_weights"] + predicted["trained_weights"] == weights
    assert predicted["moving_average"] == predicted["trained_weights"] == sum(p.nbytes for p in trained)
    assert predicted["gradients"] == sum(p.grad.nbytes for p in trained)
    assert predicted["optimizer"] == pytest.approx(sum(x.nbytes for x in state), rel=0.01)
    assert (predicted["optimizer_step"] > 0) == (optimizer == "muon")  # fused AdamW takes nothing


@pytest.mark.parametrize(
    "orders", [[CAPTION_FIRST], [IMAGE_FIRST], [CAPTION_FIRST, CAPTION_DROPPED, IMAGE_FIRST]]
)
def test_fake_tensors_cost_what_real_ones_cost(make_model, orders):
    """The same books kept on a real model, and the tensors that autograd says it saves."""
    real, fake = budget.Books(), budget.Books()
    model = make_model()
    saved = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[id(x.untyped_storage())] = x.untyped_storage()
        return x

    models = {real: model, fake: fake.model(model.config, FIXED)}
    for p in model.parameters():
        real.enter(p, 0.0)
    seen = []
    for books, m in models.items():
        latents = torch.randn(len(orders), 4, 8, 8) if books is real else books.latents(len(orders), m.config)
        batch = arrange([[5] * CAPTION] * len(orders), latents, orders, m.config)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), books:
            loss = train.step_loss(m, batch, FIXED)
            live = books.live
            if books is real:
                owned = {id(p.untyped_storage()) for p in m.parameters()}
                assert sum(s.nbytes() for k, s in saved.items() if k not in owned) <= live
            saved.clear()
            loss.backward()
        seen.append((live, books.peak))
        saved.clear()
    assert seen[0] == pytest.approx(seen[1], rel=0.02)


@functools.cache
def flops(layers: int, caption_first: float, caption_drop: float, **changes) -> dict[str, float]:
    config = with_fields(FIXED, caption_first=caption_first, caption_drop=caption_drop, **changes)
    return budget.training_flops(ModelConfig(**{**TINY, "num_hidden_layers": layers}), config, STEP, CAPTION)


def layer_flops(caption_first: float, caption_drop: float) -> dict[str, float]:
    """What one layer more costs, exactly."""
    deep, flat = (flops(n, caption_first, caption_drop) for n in (3, 2))
    return {k: deep[k] - flat[k] for k in deep}


def test_a_layer_costs_six_flops_a_trained_parameter_and_patch_and_four_a_frozen_one_and_token(make_config):
    """The formula: 2 forward, 2 backward for the gradient of the input, 2 for that of a weight; attention."""
    c = make_config()
    P, D, H, K, d = c.num_patches, c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    expert = D * d * (2 * H + 2 * K) + 3 * D * c.intermediate_size  # weights in the matrices of a layer

    def attention(n: int, s: int) -> int:
        return 4 * H * d * n * s

    one = layer_flops(1.0, 1.0)  # caption dropped: BOI, and the patches, which see it
    assert one["prefill"] == 2 * expert + attention(1, 1)
    assert one["forward"] == 2 * expert * P + attention(P, P + 1)
    assert one["backward"] == 4 * expert * P + 2 * attention(P, P + 1)
    text = CAPTION + 2  # picture first: EOI, caption and EOS come behind the patches
    other = layer_flops(0.0, 0.0)
    assert other["forward"] == 2 * expert * (P + text) + attention(P + text, P + text + 1)
    assert other["backward"] == expert * (4 * P + 2 * text) + 2 * attention(P + text, P + text + 1)


def test_flops_of_a_picture_are_the_recipes_average_and_a_step_has_all_pictures():
    dropped, behind, both = (flops(2, *x) for x in ((1.0, 1.0), (0.0, 0.0), (0.25, 1.0)))
    assert both["picture"] == pytest.approx(0.25 * dropped["picture"] + 0.75 * behind["picture"])
    assert both["step"] == FIXED.batch_size * both["picture"]


def test_the_flops_are_those_of_torchs_own_counter(make_model):
    model, latents = make_model(num_hidden_layers=2), torch.randn(1, 4, 8, 8)
    batch = arrange([[5] * CAPTION], latents, [IMAGE_FIRST], model.config)
    with FlopCounterMode(display=False, custom_mapping=budget.ATTENTION) as counter:
        train.step_loss(model, batch, FIXED).backward()
    ours = flops(2, 0.0, 0.0)
    assert counter.get_total_flops() == ours["picture"]


def test_fused_attention_on_a_cpu_is_counted():
    """Longer sequences take it; FlopCounterMode does not know it."""
    q, k = torch.randn(2, 4, 300, 8, requires_grad=True), torch.randn(2, 4, 310, 8)
    books = budget.Books()
    with books:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, k)
        forward, books.flops = books.flops, 0
        out.sum().backward()
    assert forward == 4 * 2 * 4 * 300 * 310 * 8
    assert books.flops == 10 * 2 * 4 * 300 * 310 * 8


def test_long_rows_cost_on_a_gpu_what_their_segments_cost_and_keep_less(make_config):
    """There attention is one kernel a layer; the layout, and with it the number of products, is the same."""
    config, books = make_config(num_hidden_layers=2, latent_size=16), {}
    for device in ("cpu", "cuda"):
        train_config = with_fields(FIXED, batch_size=24, pack=800, device=device)
        one = books[device] = budget.Books()
        model = one.model(config, train_config)
        batch = budget.fake_batch(one, config, train_config, (12, 4, 8), 30)
        assert model.layouts(batch.prefix, batch.rest)[1].segments
        with one:
            one.forward, loss = 0, train.step_loss(model, batch, train_config)
            one.kept, one.forward = one.live, one.flops
            loss.backward()
    cpu, gpu = books["cpu"], books["cuda"]
    assert gpu.forward == cpu.forward and gpu.kept < cpu.kept
    # the plain form of attention on a CPU does not compute its scores again in the backward pass
    assert cpu.flops <= gpu.flops < 1.1 * cpu.flops


def test_processes_share_what_is_kept_and_gather_a_part(make_config, make_model):
    config = make_config(num_hidden_layers=2)
    one, four = (budget.training_bytes(config, FIXED, STEP, n, CAPTION) for n in (1, 4))
    for name in ("frozen_weights", "trained_weights", "gradients", "optimizer"):
        assert four[name] == one[name] / 4
    assert one["gathered"] == 0
    alone = budget.training_bytes(config, with_fields(FIXED, batch_size=1), STEP, 1, CAPTION)
    assert four["activations"] == alone["activations"]  # of one picture
    assert four["computing"] < alone["gradients"] <= alone["computing"]
    model = make_model(num_hidden_layers=2, dtype=torch.bfloat16)
    largest = list(model.unet_up.parameters())  # of the units, and all of it learns
    rest = [model.embed_tokens.weight, model.norm_text.weight, model.norm_image.weight, model.boi_head]
    half = 2 * sum(p.numel() for p in rest) + (2 + 2 + 2 + 4) * sum(p.numel() for p in largest)
    assert budget.gathered_bytes(model, 4) == half
    assert four["gathered"] == pytest.approx(half * 2, rel=0.2)  # float32: 4 + 4 + 4 + 4
    units = [p for unit in (*model.layers, model.unet_down) for p in unit.parameters()]
    assert budget.gathered_bytes(model, 1) == half + 2 * sum(map(torch.numel, units)) - 2 * sum(
        p.numel() for p in largest
    )  # alone: all of them whole, not the largest twice


def test_half_precision_keeps_masters_and_halves_activations(make_config):
    config = make_config(num_hidden_layers=2)
    full, half = (
        budget.training_bytes(config, with_fields(FIXED, dtype=d), STEP, 1, CAPTION)
        for d in ("float32", "bfloat16")
    )
    for name in ("frozen_weights", "trained_weights", "gradients", "optimizer"):
        assert half[name] == full[name]
    assert half["activations"] < 0.75 * full["activations"]  # norms and rotations compute in float32


def test_small_micro_batches_keep_less_and_checkpointing_computes_again(make_config):
    config = make_config(num_hidden_layers=3)
    whole = budget.training_bytes(config, FIXED, STEP, 1, CAPTION)
    small = budget.training_bytes(config, with_fields(FIXED, micro_batch=1), STEP, 1, CAPTION)
    again = with_fields(FIXED, activation_checkpointing=True)
    less = budget.training_bytes(config, again, STEP, 1, CAPTION)
    assert small["activations"] < whole["activations"] / 2
    assert less["activations"] < whole["activations"] / 2
    once, twice = (flops(3, 1.0, 1.0, **c) for c in ({}, {"activation_checkpointing": True}))
    down = 2 * config.hidden_size * config.intermediate_size * config.num_patches  # its output is not needed
    again = 3 * (layer_flops(1.0, 1.0)["forward"] - down)
    assert twice["forward"] == once["forward"] and twice["backward"] == once["backward"] + again


def test_a_large_vocabulary_takes_the_memory_of_some_logits_at_a_time(make_config, monkeypatch):
    vocabulary = 5_000
    config = make_config(num_hidden_layers=1, vocab_size=vocabulary)
    text = with_fields(FIXED, lr_text_ratio=1.0, batch_size=16)
    plain = budget.training_bytes(config, text, STEP, 1, 30)
    monkeypatch.setattr(train, "LOGITS", 40 * vocabulary)
    less = budget.training_bytes(config, text, STEP, 1, 30)
    words = 16 * 29  # of each caption all but the first, and a few more: EOI and EOS
    logits = 4 * vocabulary * words  # bytes
    assert less["activations"] < plain["activations"] - logits
    assert less["computing"] < plain["computing"] - 2 * logits
    assert less["trained_weights"] == plain["trained_weights"]


def test_writing_reads_every_text_weight_and_the_cache_once(make_config):
    config = make_config(max_position_embeddings=101)
    text = budget.writing(config, FIXED)
    c, n = config, 100
    assert text["prompt_tokens"] == n
    assert text["cache"] == 2 * 4 * n * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    assert text["read"] == text["weights"] + text["cache"]  # tied: the head reads the whole table
    untied = budget.writing(make_config(max_position_embeddings=101, tie_word_embeddings=False), FIXED)
    assert untied["read"] == text["read"]  # the table of embeddings is there, but not read
    assert untied["weights"] == text["weights"] + 4 * c.vocab_size * c.hidden_size
    layer = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    layer += 3 * c.hidden_size * c.intermediate_size
    attention = 4 * c.num_attention_heads * c.head_dim * (n + 1)
    head = 2 * c.hidden_size * c.vocab_size
    assert text["token_flops"] == c.num_hidden_layers * (2 * layer + attention) + head


def test_painting_counts_the_prompt_once_and_the_patches_every_step(make_config):
    c = make_config()
    paint = budget.sampling(c, FIXED, CAPTION)
    deeper = budget.sampling(make_config(num_hidden_layers=4), FIXED, CAPTION)
    assert paint["picture_flops"] == paint["prefill_flops"] + 25 * paint["step_flops"]
    P, H, K, d = c.num_patches, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    layer = c.hidden_size * d * (2 * H + 2 * K) + 3 * c.hidden_size * c.intermediate_size
    text = CAPTION + 1  # the caption and BOI; the other sequence has BOI alone, and padding in the attention
    pair = 4 * H * d  # a query and a key
    once = 2 * layer * (text + 1) + 2 * pair * text**2
    assert deeper["prefill_flops"] - paint["prefill_flops"] == once
    step = 2 * (2 * layer * P + pair * P * (text + P))
    assert deeper["step_flops"] - paint["step_flops"] == step
    assert paint["cache"] == 2 * 4 * 2 * text * c.num_hidden_layers * K * d
    assert paint["peak"] > paint["weights"] + paint["cache"]


def test_the_table_ends_with_the_peak(make_config):
    report = budget.report(make_config(num_hidden_layers=1), FIXED, STEP, 2, CAPTION)
    json.dumps(report)
    lines = budget.budget_table(report).splitlines()
    peak = report["training_bytes"]["peak"] / 2**30
    assert lines[-1] == f"predicted peak of one process: {peak:.1f} GiB"
    assert "| optimizer | 0.00 GiB |" in lines and any("TFLOP" in x for x in lines)


def dry(folder: Path, *flags: object) -> list[str]:
    """The lines of a dry run on the tiny base and the tiny photos; nothing is written."""
    words = helpers.photo_flags(Path("new"), "--dry-run", *flags)
    out = helpers.good(train, *words, folder=folder)
    assert list(folder.iterdir()) == []
    return out.splitlines()


def test_the_budget_of_captions_or_pictures_alone_is_that_of_their_recipe(make_config):
    config, fixed = make_config(num_hidden_layers=1), with_fields(FIXED, caption_drop=0.0, batch_size=1)
    found = []
    for task, first in (("generate", 1.0), ("caption", 0.0)):
        ways = with_fields(fixed, task=task), with_fields(fixed, caption_first=first)
        one, same = (budget.training_flops(config, way, STEP, 20) for way in ways)
        assert one == same
        found.append((one, budget.training_bytes(config, ways[0], STEP, 1, 20)["activations"]))
    assert found[0][0]["prefill"] > found[1][0]["prefill"] and found[0][1] < found[1][1]


def test_a_dry_run_of_a_second_stage_is_of_captioned_pictures_and_says_so(tmp_path):
    lines = dry(tmp_path, "--init-from", helpers.photo_run(), "--task", "edit=2,chat=1")
    assert "captioned pictures" in lines[0] and "edit=2,chat=1" in lines[0]
    assert lines[2:] == dry(tmp_path)


@pytest.mark.parametrize("processes", [0, 3])
def test_processes_that_cannot_share_a_batch_are_refused(make_config, processes):
    with pytest.raises(ValueError, match=f"world_size = {processes}"):
        budget.report(make_config(), FIXED, STEP, processes)


LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc says what a process takes")
MEASURE = """
import json, sys
import torch
def status(name):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(name))
before = status("VmRSS")
sys.path.insert(0, sys.argv[1])
import train
from data import CAPTION_FIRST, IMAGE_FIRST, caption_document, collate
from load_qwen3 import materialise
from model import LMFusion, ModelConfig
torch.set_num_threads(1)
config, settings = ModelConfig(**json.loads(sys.argv[2])), train.TrainConfig(batch_size=1)
with torch.device("meta"):
    model = LMFusion(config)
shapes = {n: p.shape for n, p in model.text_parameters().items()}
materialise(model, lambda n: torch.randn(shapes[n]) * 0.02 + ("norm" in n), torch.float32)
optimizers = train.make_optimizers(model, settings)
for order in (CAPTION_FIRST, IMAGE_FIRST, CAPTION_FIRST):
    latents = torch.randn(1, 4, config.latent_size, config.latent_size)
    batch = collate([caption_document(None, [5] * 30, order, config)], latents, config)
    train.step_loss(model, batch, settings).backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
print(status("VmHWM") - before)
"""


def measure(config: ModelConfig) -> float:
    """Bytes that three real steps with one picture add to a process that has imported torch, at the most.

    Not by getrusage: a child's ru_maxrss starts with what its parent had.
    """
    arguments = [str(Path(budget.__file__).parent.parent), json.dumps(dataclasses.asdict(config))]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@LINUX
@pytest.mark.slow
def test_three_real_steps_take_the_memory_that_was_predicted():
    config = ModelConfig(
        32000, 512, 1536, 4, 8, 4, 64, boi_id=1, eoi_id=2, eos_id=3, unet_channels=(160, 448)
    )
    predicted = budget.training_bytes(config, train.TrainConfig(batch_size=1), STEP, 1, 30)["peak"]
    assert predicted == pytest.approx(measure(config), rel=0.25)


@LINUX
@pytest.mark.slow
def test_three_real_steps_of_qwen3_0_6b_take_the_memory_that_was_predicted():
    """Needs 15 GiB of memory and a few minutes."""
    config = known_config("Qwen/Qwen3-0.6B")
    predicted = budget.training_bytes(config, train.TrainConfig(batch_size=1), STEP, 1, 30)["peak"]
    assert predicted == pytest.approx(measure(config), rel=0.15)
