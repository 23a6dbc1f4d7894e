"""model.py: who influences whom, separation, where gradients go, and what work is done.

Every model here has all its parameters perturbed (see conftest.py). Where two ways of computing must agree,
it has float64 weights: what is left is rounding below 1e-6, and a wrong rule is off by far more. A sequence
is a list of token ids in which IMAGE stands for one whole image, as in `Tokens.rows`.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from sequences import (
    BOI,
    EOI,
    RAGGED,
    SEPARATIONS,
    STORY,
    TOLERANCE,
    PatchesAsGiven,
    brute_force_mask,
    caption_loss,
    count_images,
    ddpm_loss,
    draw,
    features,
    in_phases,
    to_slots,
    with_gradient,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import model as model_file
from attention import IMAGE, PAD, Tokens
from load_qwen3 import init_image
from model import Hidden, LMFusion, ModelConfig, RMSNorm, replace


def story_units(P: int) -> list[tuple[int, list[int]]]:
    """Index into STORY and the slots it takes."""
    units, used = [], 0
    for n, i in enumerate(STORY):
        width = P if i == IMAGE else 1
        units.append((n, list(range(used, used + width))))
        used += width
    return units


@SEPARATIONS
def test_changing_an_input_changes_exactly_the_outputs_that_may_see_it(make_model, separation):
    """So: nothing earlier changes, everything later does, and all patches of an image do."""
    model = make_model(separation=separation)
    P = model.config.num_patches
    latents, t = draw(model, count_images(STORY))
    before = features(model, [STORY], latents, t)[0]
    mask = brute_force_mask([STORY], P, len(before))
    images = 0
    for n, slots in story_units(P):
        row, changed = list(STORY), latents.clone()
        if STORY[n] == IMAGE:
            changed[images] += 0.5
            images += 1
        else:
            row[n] = 33
        difference = (features(model, [row], changed, t)[0] - before).abs().amax(1)  # (N,)
        sees = mask[:, slots].any(1)
        assert (difference[sees] > 1e-5).all(), f"item {n}: something that sees it did not change"
        assert (difference[~sees] == 0).all(), f"item {n}: something that does not see it changed"


def test_patches_of_one_image_see_each_other_both_ways_and_no_patch_of_another_before_it(make_model):
    model = make_model()
    P, D = model.config.num_patches, model.config.hidden_size
    latents, t = draw(model, 3)
    patches = torch.randn(3, P, D, generator=torch.Generator().manual_seed(1))
    slots = [slots for n, slots in story_units(P) if STORY[n] == IMAGE]
    model.unet_down = PatchesAsGiven(patches)
    before = features(model, [STORY], latents, t)[0]
    for m in range(3):
        for p in (0, P // 2, P - 1):
            changed = patches.clone()
            changed[m, p] += 0.5
            model.unet_down = PatchesAsGiven(changed)
            difference = (features(model, [STORY], latents, t)[0] - before).abs().amax(1)
            first = slots[m][0]
            assert (
                difference[first:] > 1e-6
            ).all()  # all patches of this image, those before p too; all behind it
            assert (difference[:first] == 0).all()


def test_each_patch_takes_one_position_in_the_order_of_the_words_it_stands_for(make_model):
    """In a dense model of one layer, keys and values depend on inputs alone: patches that are the embeddings
    of words look to whatever sees all of them exactly like those words.
    """
    model = make_model(separation="none", num_hidden_layers=1, dtype=torch.float64)
    P = model.config.num_patches
    words = list(range(20, 20 + P))
    model.unet_down = PatchesAsGiven(model.embed_tokens.weight[None, 20 : 20 + P])
    image = features(model, [[5, BOI, IMAGE, EOI, 6]], *draw(model, 1))[0]
    text = features(model, [[5, BOI, *words, EOI, 6]])[0]
    alike = [0, 1, *range(1 + P, 4 + P)]  # before the image, its last patch, behind it
    torch.testing.assert_close(image[alike], text[alike], **TOLERANCE)
    assert (
        (image - text)[2 : 1 + P].abs().amax(1) > 1e-3
    ).all()  # the other patches see more than the words do


def test_the_timestep_enters_through_the_unet_and_nowhere_else(make_model):
    model = make_model()
    latents, t = draw(model, 1)
    rows = [[5, BOI, IMAGE, EOI]]
    assert not torch.equal(features(model, rows, latents, t), features(model, rows, latents, t + 1))
    model.unet_down = PatchesAsGiven(torch.randn(1, model.config.num_patches, model.config.hidden_size))
    assert torch.equal(features(model, rows, latents, t), features(model, rows, latents, t + 1))


def test_forward_without_a_prefix_reads_the_rest_alone(make_model):
    model = make_model()
    latents, t = draw(model, 1)
    rest = Tokens.rows([[IMAGE, EOI, 5]], model.config.num_patches)
    before, after = model(None, rest, latents, t)
    assert before is None
    assert torch.equal(to_slots(after, rest), features(model, [[IMAGE, EOI, 5]], latents, t))


def test_a_batch_whose_sequences_all_begin_with_their_image_can_be_read(make_model):
    model = make_model()
    latents, t = draw(model, 2)
    prefix, rest = in_phases([[IMAGE, EOI], [IMAGE, EOI, 5]], model.config.num_patches)
    after = model(prefix, rest, latents, t)[1]
    assert torch.equal(to_slots(after, rest), features(model, [[IMAGE, EOI], [IMAGE, EOI, 5]], latents, t))


def expert_size(config: ModelConfig, whole: bool) -> int:
    """Parameters of an expert, or of only its FFN and the FFN's norm."""
    D, d = config.hidden_size, config.head_dim
    ffn = 3 * D * config.intermediate_size + D
    own_attention = 2 * D * d * (config.num_attention_heads + config.num_key_value_heads) + 2 * d + D
    return ffn + (own_attention if whole else 0)


@SEPARATIONS
@pytest.mark.parametrize("tied", (True, False))
def test_parameter_counts_tell_the_truth(make_model, separation, tied):
    model = make_model(separation=separation, tie_word_embeddings=tied)
    c = model.config
    text = (
        c.num_hidden_layers * expert_size(c, True) + c.hidden_size + c.vocab_size * c.hidden_size * (2 - tied)
    )
    image = {
        "deep": c.num_hidden_layers * expert_size(c, True) + c.hidden_size,
        "shallow": c.num_hidden_layers * expert_size(c, False) + c.hidden_size,
        "none": 0,
    }[separation]
    unet = sum(p.numel() for part in (model.unet_down, model.unet_up) for p in part.parameters())
    sizes = [
        sum(p.numel() for p in part.values()) for part in (model.text_parameters(), model.image_parameters())
    ]
    assert sizes == [text, image + unet + c.hidden_size]  # the last: the row that decides when to draw
    assert sum(p.numel() for p in model.parameters()) == sum(sizes)
    both = [*model.text_parameters().values(), *model.image_parameters().values()]
    assert {id(p) for p in both} == {id(p) for p in model.parameters()} and len(both) == len(
        set(map(id, both))
    )


def test_what_is_shared_is_the_same_object_and_nothing_else_is(make_model):
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    shared = {"deep": (), "shallow": ("input_layernorm", "self_attn"), "none": parts}
    for separation, expected in shared.items():
        model = make_model(separation=separation)
        for block in model.layers:
            assert (block.image is block.text) == (separation == "none")
            assert tuple(p for p in parts if getattr(block.image, p) is getattr(block.text, p)) == expected
            text, image = (dict(e.named_parameters()) for e in (block.text, block.image))
            for name, p in image.items():
                own = not name.startswith(expected) if expected else True
                assert (p is not text[name]) == own and (p.data_ptr() != text[name].data_ptr()) == own
        assert (model.norm_image is model.norm_text) == (separation == "none")


def test_text_logits_are_identical_across_all_separations(make_model):
    deep = make_model(seed=0)
    ids = torch.randint(64, (2, 15), generator=torch.Generator().manual_seed(0))
    expected = deep.text_logits(ids)
    for separation in ("shallow", "none"):
        model = make_model(seed=1, separation=separation)
        assert not torch.equal(model.text_logits(ids), expected)
        assert model.text_parameters().keys() == deep.text_parameters().keys()
        with torch.no_grad():
            for name, p in model.text_parameters().items():
                p.copy_(deep.text_parameters()[name])
        assert torch.equal(model.text_logits(ids), expected)


def test_text_logits_do_not_depend_on_any_image_parameter(make_model):
    model = make_model()
    ids = torch.randint(64, (2, 15), generator=torch.Generator().manual_seed(0))
    expected = model.text_logits(ids)
    with torch.no_grad():
        for p in model.image_parameters().values():
            p.fill_(torch.nan)
    assert torch.equal(model.text_logits(ids), expected)


def two_phases(model: LMFusion, rows: list[list[int]]) -> tuple[Hidden, Hidden, Tensor]:
    latents, t = draw(model, sum(map(count_images, rows)))
    before, after = model(*in_phases(rows, model.config.num_patches), latents, t)
    return before, after, latents


@pytest.mark.parametrize(
    "rows",
    [[[BOI, IMAGE, EOI, 6, 7, 8]], [[5, 6, BOI, IMAGE, EOI, 6, 7, 8], [BOI, IMAGE, 9]]],
    ids=("image first", "text before, ragged"),
)
@pytest.mark.parametrize("patch_positions", (False, True))
def test_a_caption_reaches_all_of_the_image_side_that_its_tokens_see_and_no_text_parameter(
    make_model, rows, patch_positions
):
    """Text after an image reads the keys and values of every layer: all of UNet-Down, every image expert up
    to the last one's keys and values. The last image output, the image final norm and UNet-Up come later.
    """
    model = make_model(patch_positions=patch_positions)
    caption_loss(model, two_phases(model, rows)[1]).backward()
    last = f"layers.{model.config.num_hidden_layers - 1}.image."
    keys_and_values = ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")
    expected = {n for n in model.image_parameters() if n.startswith(("unet_down.", "layers."))}
    expected -= {
        n for n in expected if n.startswith(last) and not n.removeprefix(last).startswith(keys_and_values)
    }
    assert with_gradient(model) == expected
    assert sum(n.startswith(last) for n in expected) == 4 and "unet_down.conv_in.weight" in expected
    assert all(p.grad is None for p in model.text_parameters().values())


@SEPARATIONS
def test_the_ddpm_loss_reaches_every_image_parameter_but_the_drawing_row(make_model, separation):
    model = make_model(separation=separation, patch_positions=True)
    _, after, latents = two_phases(model, [[5, 6, BOI, IMAGE, EOI, 7], [BOI, IMAGE]])
    ddpm_loss(model, after, latents).backward()
    assert with_gradient(model) == set(model.image_parameters()) - {"boi_head"}
    assert all(p.grad is None for p in model.text_parameters().values())


def test_with_shared_attention_a_caption_trains_the_image_ffns_below_the_last(make_model):
    model = make_model(separation="shallow")
    caption_loss(model, two_phases(model, [[BOI, IMAGE, EOI, 6]])[1]).backward()
    last = f"layers.{model.config.num_hidden_layers - 1}."
    assert with_gradient(model) == {
        n
        for n in model.image_parameters()
        if n.startswith(("unet_down.", "layers.")) and not n.startswith(last)
    }


def test_text_with_no_image_before_it_has_no_gradient_so_the_prefix_runs_without_a_graph(make_model):
    model = make_model()
    before, after, _ = two_phases(model, [[5, 6, BOI, IMAGE, EOI, 7]])
    assert before.text.grad_fn is None and not any(x.requires_grad for x in before.cache.k + before.cache.v)
    assert after.text.requires_grad and after.image.requires_grad
    whole = model.encode(
        Tokens.text(torch.tensor([[5, 6, 7]]))
    )  # and even with a graph there is none to keep
    assert not whole.text.requires_grad


def test_with_trainable_text_the_prefix_keeps_its_graph_and_is_trained(make_model):
    model = make_model()
    model.freeze_text(False)
    before, after, latents = two_phases(model, [[5, 6, BOI, IMAGE, EOI, 7]])
    assert before.text.requires_grad and all(x.requires_grad for x in before.cache.k + before.cache.v)
    ddpm_loss(model, after, latents).backward()
    last = f"layers.{model.config.num_hidden_layers - 1}.text."
    reached = with_gradient(model) & set(model.text_parameters())
    assert {
        "embed_tokens.weight",
        "layers.0.text.mlp.up_proj.weight",
        last + "self_attn.k_proj.weight",
    } <= reached
    assert last + "mlp.up_proj.weight" not in reached and "norm_text.weight" not in reached
    with torch.no_grad():
        assert not two_phases(model, [[5, BOI, IMAGE]])[0].text.requires_grad


def test_two_phases_give_the_gradients_of_one_encode(make_model):
    model = make_model(dtype=torch.float64)
    rows = [[5, 6, BOI, IMAGE, EOI, 7, 8]]
    _, after, latents = two_phases(model, rows)
    (caption_loss(model, after) + ddpm_loss(model, after, latents)).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden = model.encode(Tokens.rows(rows, model.config.num_patches), *draw(model, 1))
    after = Hidden(hidden.text[3:], hidden.image, hidden.unet, hidden.cache)
    (caption_loss(model, after) + ddpm_loss(model, after, latents)).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-4 * scale)


def test_the_drawing_row_trains_on_frozen_features_alone(make_model):
    model = make_model()
    _, after, _ = two_phases(model, [[BOI, IMAGE, EOI, 6, 7]])
    F.binary_cross_entropy_with_logits(model.draw_logit(after.text), torch.tensor([0.0, 1.0, 0.0])).backward()
    assert with_gradient(model) == {"boi_head"}


class WorkByWeight(TorchDispatchMode):
    """Counts floating-point operations by the parameter they multiply with; None where none is involved.

    The formulas of torch's FlopCounterMode, but this also tells whose weights a backward pass goes through.
    """

    def __init__(self, model: LMFusion):
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): n for n, p in model.named_parameters()}
        self.work: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            pointers = [x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)]
            owner = next((self.names[x] for x in pointers if x in self.names), None)
            self.work[owner] += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def on(self, *parts: str) -> int:
        """Work on parameters whose name contains one of `parts`."""
        return sum(n for name, n in self.work.items() if name and any(part in name for part in parts))


TEXT = (".text.", "embed_tokens.", "lm_head.", "norm_text.")


def work_of(model: LMFusion, run) -> WorkByWeight:
    with WorkByWeight(model) as counter:
        run()
    return counter


def matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)


def encode_work(model: LMFusion, rows: list[list[int]]) -> WorkByWeight:
    latents, t = draw(model, sum(map(count_images, rows)))
    return work_of(model, lambda: features(model, rows, latents, t))


def test_the_counter_agrees_with_torchs_own(make_model):
    model = make_model()
    latents, t = draw(model, 3)
    with FlopCounterMode(display=False) as torchs:
        features(model, [STORY], latents, t)
    assert sum(encode_work(model, [STORY]).work.values()) == torchs.get_total_flops() > 0


def test_each_token_costs_the_work_of_its_own_expert_and_none_of_the_others(make_model):
    model = make_model()
    P = model.config.num_patches
    per_text = 2 * sum(matrices(block.text) for block in model.layers)
    per_patch = 2 * sum(matrices(block.image) for block in model.layers)
    for rows in (
        [[5, BOI, IMAGE, EOI]],
        [[5] * 33 + [BOI, IMAGE, EOI]],
        [[5, BOI, IMAGE, IMAGE, IMAGE, EOI]],
        [[5, 6, 7]],
        [[IMAGE]],
        RAGGED,
    ):
        work = encode_work(model, rows)
        images = sum(map(count_images, rows))
        assert work.on(".text.") == per_text * (sum(map(len, rows)) - images)  # padding costs nothing either
        assert work.on(".image.") == per_patch * images * P
        assert work.on("lm_head", "embed_tokens") == 0


def test_a_denoising_step_over_a_cached_prompt_costs_the_same_projections_whatever_the_prompts_length(
    make_model,
):
    model = make_model()
    latents, t = draw(model, 1)
    work = {}
    for length in (8, 512):
        with torch.no_grad():
            cache = model.encode(Tokens.text(torch.full((1, length), 5))).cache
            tokens = Tokens.rows([[IMAGE]], model.config.num_patches, start=[length])
            work[length] = work_of(
                model,
                lambda tokens=tokens, cache=cache: model.unet_output(model.encode(tokens, latents, t, cache)),
            )
    attention_work = {length: counter.work.pop(None) for length, counter in work.items()}
    assert work[8].work == work[512].work and work[8].on(".image.") > 0 and work[8].on(*TEXT) == 0
    assert attention_work[512] > attention_work[8]


def training_step(model: LMFusion, rows: list[list[int]]) -> tuple[WorkByWeight, WorkByWeight]:
    """Work forward and backward of a step with captions before images: the diffusion loss alone."""
    latents, t = draw(model, sum(map(count_images, rows)))
    phases, losses = in_phases(rows, model.config.num_patches), []
    forward = work_of(model, lambda: losses.append(ddpm_loss(model, model(*phases, latents, t)[1], latents)))
    return forward, work_of(model, losses[0].backward)


@pytest.mark.parametrize("tied", (True, False))
def test_a_caption_first_step_projects_nothing_to_the_vocabulary_and_does_not_go_back_through_text(
    make_model, tied
):
    model = make_model(tie_word_embeddings=tied)
    rows = [[5, 6, 7, 8, BOI, IMAGE], [5, 6, BOI, IMAGE]]
    forward, backward = training_step(model, rows)
    assert forward.on(".text.") == 2 * sum(matrices(block.text) for block in model.layers) * 8
    assert forward.on("lm_head", "embed_tokens") == backward.on(*TEXT) == 0
    assert backward.on(".image.") > 0 and backward.on("unet_down.") > 0 and backward.on("unet_up.") > 0
    model.freeze_text(False)  # the counter would have seen it
    assert training_step(model, rows)[1].on(".text.") > 0


@pytest.mark.parametrize("attention", (True, False), ids=("attention", "convolutions"))
@pytest.mark.parametrize("which", ([0], [3, 1], [1, 1, 4], [0, 1, 2, 3, 4]), ids=str)
def test_the_output_of_some_images_is_that_of_all_of_them_at_their_places(make_model, which, attention):
    model = make_model(dtype=torch.float64, unet_attention=attention)
    latents, t = draw(model, 5)
    tokens, index = Tokens.rows([[BOI, IMAGE, EOI, IMAGE], [IMAGE] * 3], 16), torch.tensor(which)
    hidden, wanted, gradients = model.encode(tokens, latents, t), torch.randn(len(which), 4, 8, 8), []
    outputs = [model.unet_output(hidden, index), model.unet_output(hidden)[index]]
    for output in outputs:
        model.zero_grad()
        (output * wanted).sum().backward(retain_graph=True)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*outputs, **TOLERANCE)
    assert outputs[0].dtype == torch.float32 and outputs[0].std() > 1e-3
    assert (
        gradients[0].keys() == gradients[1].keys() >= dict(model.unet_up.named_parameters("unet_up")).keys()
    )
    for name, x in gradients[0].items():
        # a float32 output, of a draw that is another each time
        torch.testing.assert_close(x, gradients[1][name], rtol=1e-4, atol=1e-5)


@SEPARATIONS
@pytest.mark.parametrize("frozen", (True, False), ids=("frozen text", "trained text"))
@pytest.mark.parametrize("form", ("chosen", "segments"))
def test_activation_checkpointing_changes_no_loss_and_no_gradient_and_keeps_less(
    make_model, monkeypatch, separation, frozen, form
):
    model = make_model(separation=separation)
    model.freeze_text(frozen)
    if form == "segments":
        monkeypatch.setattr("attention.DENSE", 0)
    phases = in_phases(RAGGED, model.config.num_patches, pack=120)
    latents, t = draw(model, sum(map(count_images, RAGGED)))
    found = []
    for on in (False, True):
        model.activation_checkpointing = on
        saved: dict[int, int] = {}

        def keep(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            after = model(*phases, latents, t)[1]
            loss = ddpm_loss(model, after, latents) + caption_loss(model, after)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        found.append((loss.item(), grads, sum(n for x, n in saved.items() if x not in own)))
    (loss, grads, bytes_), (loss_on, grads_on, bytes_on) = found
    assert loss_on == loss and grads_on.keys() == grads.keys()
    for name, x in grads.items():
        torch.testing.assert_close(grads_on[name], x, rtol=1e-6, atol=1e-6 * x.abs().max().item())
    assert bytes_on < 0.6 * bytes_


def test_activation_checkpointing_is_off_where_no_gradient_is_wanted(make_model, monkeypatch):
    model, calls = make_model(), []
    model.activation_checkpointing = True
    real = model_file.checkpoint
    monkeypatch.setattr(model_file, "checkpoint", lambda *a, **k: calls.append(a) or real(*a, **k))
    with torch.no_grad():
        features(model, [STORY], *draw(model, 3))
    assert not calls
    model.encode(Tokens.rows([STORY], model.config.num_patches), *draw(model, 3))
    assert len(calls) == model.config.num_hidden_layers


def test_encode_keeps_keys_and_values_only_if_it_is_asked_to(make_model):
    model = make_model()
    tokens, images = Tokens.rows([STORY], model.config.num_patches), draw(model, 3)
    kept, dropped = model.encode(tokens, *images), model.encode(tokens, *images, keep=False)
    assert dropped.cache is None and len(kept.cache.k) == len(kept.cache.v) == model.config.num_hidden_layers
    assert torch.equal(kept.text, dropped.text) and torch.equal(kept.image, dropped.image)
    after = model(*in_phases([STORY], model.config.num_patches), *images)[1]
    assert after.cache is None


@torch.no_grad()
@pytest.mark.parametrize("keep", (True, False))
def test_keys_and_values_that_are_not_kept_are_gone_with_their_layer(make_model, keep):
    model, alive = make_model(), []
    first, last = model.layers[0], model.layers[-1]
    first.register_forward_hook(lambda m, a, out: alive.extend(map(weakref.ref, out[2:])))
    last.register_forward_pre_hook(lambda m, a: alive.append([x() is not None for x in alive]))
    model.encode(Tokens.rows([STORY], model.config.num_patches), *draw(model, 3), keep=keep)
    assert alive[-1] == [keep, keep]


@SEPARATIONS
def test_the_text_final_norm_never_trains(make_model, separation):
    model = make_model(separation=separation)
    for frozen in (True, False, True, False):
        model.freeze_text(frozen)
        assert not model.norm_text.weight.requires_grad
        assert model.text_is_frozen == frozen
        for name, p in model.text_parameters().items():
            assert p.requires_grad == (not frozen and name != "norm_text.weight")
        assert all(p.requires_grad for p in model.image_parameters().values())


@pytest.mark.parametrize("shape", ((), (5,), (1, 0), (2, 3, 4)))
def test_ids_that_are_no_batch_of_sequences_are_refused(make_model, shape):
    with pytest.raises(ValueError, match="ids"):
        make_model().text_logits(torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("bad", (IMAGE, PAD, 64))
def test_ids_outside_the_vocabulary_are_refused(make_model, bad):
    with pytest.raises(ValueError, match=f"{bad}"):
        make_model().text_logits(torch.tensor([[5, bad]]))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (dict(separation="Deep"), ("separation", "Deep", "deep", "shallow", "none")),
        (dict(num_key_value_heads=3), ("num_attention_heads", "num_key_value_heads", "3")),
        (dict(latent_size=7), ("latent_size", "7")),
        (dict(head_dim=15), ("head_dim", "15")),
    ],
)
def test_a_bad_configuration_names_the_field_and_the_choices(make_config, changes, names):
    with pytest.raises(ValueError) as error:
        make_config(**changes)
    assert all(name in str(error.value) for name in names)


def test_replace_changes_fields_and_names_the_choices_for_a_typo(make_config):
    config = make_config()
    changed = replace(config, latent_size=16)
    assert (changed.latent_size, changed.num_patches, config.latent_size) == (16, 64, 8)
    with pytest.raises(ValueError, match="latentsize.*latent_size"):
        replace(config, latentsize=16)


def test_the_drawing_row_gives_boi_its_probability_and_leaves_the_rest_in_proportion(make_model):
    model = make_model()
    hidden = model.encode(Tokens.text(torch.tensor([[5, 6, 7]])))
    logits, draw_logit = model.logits(hidden.text), model.draw_logit(hidden.text)  # (T, V), (T,)
    others = torch.cat((logits[:, :BOI], logits[:, BOI + 1 :]), dim=1)
    with_row = torch.cat((others, (others.logsumexp(1) + draw_logit)[:, None]), dim=1).softmax(1)
    torch.testing.assert_close(with_row[:, -1], torch.sigmoid(draw_logit))
    torch.testing.assert_close(with_row[:, :-1] / with_row[:, :-1].sum(1, keepdim=True), others.softmax(1))


def test_rms_norm_normalises_in_float32_and_scales_in_the_dtype_that_goes_in():
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(8, 1e-6).bfloat16()
    with torch.no_grad():
        norm.weight.add_(torch.randn(8, generator=generator))
    x = torch.randn(50, 8, generator=generator).bfloat16() * 300
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), expected.bfloat16() * norm.weight)


def test_image_experts_start_as_copies_and_draw_what_the_text_experts_would(make_model, perturb):
    """A deep model whose experts were just copied equals a dense one of the same text weights and U-Net."""
    deep, dense = make_model(), make_model(separation="none")
    init_image(deep)
    perturb(deep.unet_down), perturb(deep.unet_up)
    state = deep.state_dict()
    dense.load_state_dict(
        {
            n: state[n.replace(".image.", ".text.").replace("norm_image", "norm_text")]
            for n in dense.state_dict()
        }
    )
    latents, t = draw(deep, 3)
    assert torch.equal(features(deep, [STORY], latents, t), features(dense, [STORY], latents, t))


@SEPARATIONS
def test_the_image_side_starts_from_the_text_by_name_and_from_the_seed_alone(make_model, separation):
    model = make_model(separation=separation, dtype=torch.float64)
    assert (model.dtype, model.device) == (torch.float64, torch.device("cpu"))
    text, image = model.text_parameters(), model.image_parameters()
    torch.manual_seed(3)
    first = dict(model.image_at_start(text.__getitem__))
    assert first.keys() == image.keys() and not first["boi_head"].any()
    copied = [n for n in first if ".image." in n or n == "norm_image.weight"]
    assert (
        len(copied)
        == {"deep": 1 + 11 * len(model.layers), "shallow": 1 + 4 * len(model.layers), "none": 0}[separation]
    )
    for name in copied:
        assert torch.equal(first[name], text[name.replace("image", "text")])
        assert not torch.equal(first[name], image[name])
    torch.manual_seed(3)
    init_image(model)
    assert all(torch.equal(p, first[n]) for n, p in image.items())


def test_patches_start_about_as_large_as_words(make_model, perturb):
    model = make_model(patch_positions=False)
    init_image(model)
    latents, t = draw(model, 32)
    patches = model.unet_down(latents, t)[0]
    ratio = (patches.pow(2).mean() / model.embed_tokens.weight.pow(2).mean()).sqrt().item()
    assert 0.7 < ratio < 1.4


# ---- what a GPU does in a faster way, on a CPU ----


@pytest.mark.parametrize("separation", ("deep", "none"))
@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiled_experts_equal_the_plain_ones(make_model, monkeypatch, backend, separation):
    """Expert.qkv and Expert.output: features and gradients, with and without a graph."""
    compiled = functools.lru_cache(lambda f: torch.compile(f, backend=backend, dynamic=True))
    monkeypatch.setattr(model_file, "compiled", compiled)
    found = []
    for fast in (False, True):
        model = make_model(dtype=torch.float64, separation=separation)
        if fast:
            model.compile_experts()
        out = []
        for checkpointing, rows in ((False, RAGGED), (True, RAGGED[:2]), (False, [[BOI, IMAGE]])):
            model.activation_checkpointing = checkpointing
            _, after, latents = two_phases(model, rows)
            (after.image.square().mean() + ddpm_loss(model, after, latents)).backward()
            out.append(after.image.detach())
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            out.append(model.text_logits(torch.tensor([[5]])))  # one token: a size of its own
        found.append((out, gradients))
    (plain, wanted), (fast, got) = found
    for a, b in zip(plain, fast, strict=True):
        assert torch.allclose(a, b, atol=1e-5)  # RoPE is in float32
    assert wanted.keys() == got.keys() and len(got) > 50
    for name, value in wanted.items():
        assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_the_norm_without_an_upcast_is_bit_equal_to_the_one_with_it(dtype):
    x = (torch.randn(300, 1024, generator=torch.Generator().manual_seed(0)) * 30).to(dtype)
    norm = RMSNorm(1024, 1e-6).to(dtype)
    norm.weight.data = torch.randn(1024).to(dtype)
    x32 = x.float()
    upcast = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)).to(dtype) * norm.weight
    close = (norm(x) == upcast).float().mean()
    assert torch.equal(norm(x), upcast) if dtype != torch.float32 else close > 0.5


def test_channels_last_gives_the_same_unet(make_model):
    model = make_model(dtype=torch.float64, unet_channels=(8, 64))
    latents, t = draw(model, 3)
    tokens, out = Tokens.rows([[IMAGE]] * 3, model.config.num_patches), []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        hidden = model.encode(tokens, latents.contiguous(memory_format=memory_format), t)
        out.append(model.unet_output(hidden))
    assert torch.allclose(*out, atol=1e-9)


def test_a_layout_made_ahead_and_latents_that_come_again_are_those_of_a_plain_call(make_model):
    model = make_model(dtype=torch.float64)
    P, (latents, t) = model.config.num_patches, draw(model, 2)
    cache = model.encode(Tokens.rows([[5, BOI], [6, BOI], [BOI], [BOI]], P)).cache
    tokens = Tokens.rows([[IMAGE]] * 4, P, [2, 2, 1, 1])
    plain = model.encode(tokens, latents.repeat(2, 1, 1, 1), t.repeat(2), cache)
    again = model.encode(tokens, latents, t, cache, layout=model.layout(tokens, cache))
    assert torch.allclose(plain.image, again.image, atol=1e-12)
    assert torch.allclose(model.unet_output(plain), model.unet_output(again), atol=1e-6)
    assert torch.equal(again.unet[2], t.repeat(2))
