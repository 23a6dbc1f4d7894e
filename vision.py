"""The eyes of a stock vision-language model: a picture -> what its language model reads in place of words.

    vision = load_vision("llava-hf/llava-v1.6-mistral-7b-hf")    # a hub id or a folder
    seen = vision.look(Image.open("cat.png"))                    # seen.features (n, D)

Section 5.3 of the paper freezes a vision-language model and trains an image expert beside it. The frozen
model sees, through its own tower and projector, which are here; the expert beside it draws. A shown picture
stands in the text as n times the id `vision.placeholder_id`, and its features replace that id's embeddings.

Families: `llava` and `llava_next`, with the tower of CLIP or SigLIP, and `qwen3_vl`. Modules have
transformers' names. A folder holds `config.json`, the weights, and `processor_config.json` or
`preprocessor_config.json`, which says how pictures are prepared. Every tensor but the language model's is
accounted for by name and shape; what is not known is a ValueError that names the field or the tensor.

Shapes: n placeholders of a picture; D hidden size of the language model, h of the tower; T tiles of a
picture, S pixels a side of a tile, g patches a side; N tokens of a tile within the tower.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from load_qwen3 import match_tensors, open_weights, read_json, resolve
from model import apply_rope

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
MOST_ASPECT = 200  # Qwen's own limit, here for all: a thinner picture would be stretched to a million pixels


@dataclass
class Seen:
    """What the language model reads of one picture."""

    features: Tensor  # (n, D): the embeddings of the n placeholders
    # Of Qwen3-VL alone: what is added to the hidden states of the placeholders behind the language model's
    # first layers, (n, D) each; and the rows and columns of the n, from which their positions follow.
    deepstack: list[Tensor] | None = None
    grid: tuple[int, int] | None = None
    placeholder_id: int | None = None

    @property
    def mrope(self) -> Tensor:
        """(n, 3) for `attention.rope_positions`; zeros where a placeholder counts as a word does."""
        if self.grid is None:
            return torch.zeros(len(self.features), 3, dtype=torch.long)
        rows, columns = map(torch.arange, self.grid)
        mrope = torch.cartesian_prod(torch.ones(1, dtype=torch.long), rows, columns)
        mrope[-1, 0] -= max(self.grid)
        return mrope


# ---- Pixels ----


def on_white(picture: Image.Image) -> Image.Image:
    """The picture in RGB, what is transparent on white; ValueError if it is too thin."""
    w, h = picture.size
    if not min(w, h) or max(w, h) > MOST_ASPECT * min(w, h):
        raise ValueError(f"a picture of {w} x {h} pixels is too thin; {MOST_ASPECT} to 1 is the most")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


@dataclass(frozen=True)
class Preparation:
    """What all image processors do, as those of transformers do it that resize with Pillow.

    Its others resize with torchvision, a little differently.
    """

    resample: int
    factor: float
    mean: list[float]
    std: list[float]

    def normalise(self, picture: Image.Image) -> Tensor:
        """RGB -> (3, height, width), float32."""
        x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        mean, std = (torch.tensor(c)[:, None, None] for c in (self.mean, self.std))
        return ((x.double() * self.factor).float() - mean) / std


def best_pinpoint(size: tuple[int, int], pinpoints: list[list[int]]) -> list[int]:
    """The height and width that keep most of a picture's pixels; of those, the one with least padding."""
    w, h = size

    def kept(pinpoint: list[int]) -> tuple[int, int]:
        H, W = pinpoint
        scale = min(W / w, H / h)
        pixels = min(int(w * scale) * int(h * scale), w * h)
        return pixels, pixels - H * W

    return max(pinpoints, key=kept)  # the first of equals


def anyres_tiles(picture: Image.Image, size: list[int], S: int, resample: int) -> list[Image.Image]:
    """The whole picture squashed to one tile; then as large as fits into `size`, on black, cut row by row."""
    (w, h), (H, W) = picture.size, size
    if W / w < H / h:
        inner = W, min(math.ceil(h * (W / w)), H)
    else:
        inner = min(math.ceil(w * (H / h)), W), H
    board = Image.new("RGB", (W, H))
    board.paste(picture.resize(inner, resample), ((W - inner[0]) // 2, (H - inner[1]) // 2))
    corners = [(x, y) for y in range(0, H, S) for x in range(0, W, S)]
    return [picture.resize((S, S), resample), *(board.crop((x, y, x + S, y + S)) for x, y in corners)]


# ---- CLIP and SigLIP ----


@dataclass(frozen=True)
class TowerConfig:
    """The fields of a vision_config that decide what is computed, with the defaults of transformers' CLIP."""

    clip: bool = True  # a class token in front, a norm before the layers, no bias in the first convolution
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224  # S
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    vision_use_head: bool = False  # SigLIP's pooling, which LLaVA does not use

    @property
    def grid(self) -> int:
        """g."""
        return self.image_size // self.patch_size


class TowerLayer(nn.Module):
    """(T, N, h) -> (T, N, h)."""

    def __init__(self, c: TowerConfig):
        super().__init__()
        h, m, eps = c.hidden_size, c.intermediate_size, c.layer_norm_eps
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(h, h) for name in ("q", "k", "v", "out")})
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(h, eps), nn.LayerNorm(h, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(h, m), "fc2": nn.Linear(m, h)})
        self.heads, self.act = c.num_attention_heads, ACTIVATIONS[c.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        y, attn = self.layer_norm1(x), self.self_attn
        q, k, v = (attn[f"{n}_proj"](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in "qkv")
        y = F.scaled_dot_product_attention(q, k, v)  # (T, heads, N, h / heads): all tokens see one another
        x = x + attn["out_proj"](y.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](self.act(self.mlp["fc1"](self.layer_norm2(x))))


class Tower(nn.Module):
    """CLIP or SigLIP: tiles (T, 3, S, S) -> tokens (T, N, h) behind the layers asked for."""

    def __init__(self, c: TowerConfig):
        super().__init__()
        h, m, p, eps = c.hidden_size, c.intermediate_size, c.patch_size, c.layer_norm_eps
        patches = nn.Conv2d(3, h, p, stride=p, bias=not c.clip)
        positions = nn.Embedding(c.grid**2 + c.clip, h)
        self.embeddings = nn.ModuleDict({"patch_embedding": patches, "position_embedding": positions})
        if c.clip:
            self.embeddings.class_embedding = nn.Parameter(torch.zeros(h))
            self.pre_layrnorm = nn.LayerNorm(h, eps)  # CLIP's own spelling
        layers = nn.ModuleList(TowerLayer(c) for _ in range(c.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(h, eps)  # stored, but not used by LLaVA; nor is the head
        if c.vision_use_head:
            mlp = nn.ModuleDict({"fc1": nn.Linear(h, m), "fc2": nn.Linear(m, h)})
            attention = nn.MultiheadAttention(h, c.num_attention_heads)
            norm = nn.LayerNorm(h, eps)
            self.head = nn.ModuleDict({"attention": attention, "layernorm": norm, "mlp": mlp})
            self.head.probe = nn.Parameter(torch.zeros(1, 1, h))
        self.clip = c.clip

    def forward(self, tiles: Tensor, behind: list[int]) -> list[Tensor]:
        """`behind`: after how many layers, each from 0 on; those above the highest do not run."""
        x = self.embeddings["patch_embedding"](tiles).flatten(2).transpose(1, 2)  # (T, g * g, h)
        if self.clip:
            x = torch.cat((self.embeddings.class_embedding.expand(len(x), 1, -1), x), dim=1)  # (T, N, h)
        x = x + self.embeddings["position_embedding"].weight
        x = self.pre_layrnorm(x) if self.clip else x
        found = {0: x}
        for i, layer in enumerate(self.encoder["layers"][: max(behind)], start=1):
            x = layer(x)
            if i in behind:
                found[i] = x
        return [found[i] for i in behind]


# ---- LLaVA and LLaVA-NeXT ----


@dataclass(frozen=True)
class LlavaConfig:
    """The fields of a LLaVA's files that decide what is computed."""

    tower: TowerConfig
    text_size: int  # D
    behind: list[int]  # after how many layers of the tower; several are projected side by side
    drop_first: bool  # leave out the first token: CLIP's class token
    hidden_act: str
    bias: bool
    preparation: Preparation
    edge: int  # the shorter side after resizing; both sides with `squash`
    squash: bool
    pinpoints: list[list[int]] | None  # of LLaVA-NeXT: heights and widths that hold whole tiles


class Llava(nn.Module):
    """A tower and a projector. LLaVA sees the middle of a picture, LLaVA-NeXT all of it in several tiles."""

    def __init__(self, c: LlavaConfig):
        super().__init__()
        D, h = c.text_size, c.tower.hidden_size * len(c.behind)
        self.config, self.vision_tower = c, Tower(c.tower)
        linear_1, linear_2 = nn.Linear(h, D, bias=c.bias), nn.Linear(D, D, bias=c.bias)
        self.multi_modal_projector = nn.ModuleDict({"linear_1": linear_1, "linear_2": linear_2})
        if c.pinpoints:
            self.image_newline = nn.Parameter(torch.zeros(D))

    def pixels(self, picture: Image.Image) -> Tensor:
        """RGB -> tiles (T, 3, S, S)."""
        c, (w, h) = self.config, picture.size
        S, resample = c.tower.image_size, c.preparation.resample
        if c.pinpoints:
            tiles = anyres_tiles(picture, best_pinpoint(picture.size, c.pinpoints), S, resample)
        else:
            size = [c.edge if c.squash else int(c.edge * side / min(w, h)) for side in (w, h)]
            left, top = ((side - S) // 2 for side in size)
            tiles = [picture.resize(size, resample).crop((left, top, left + S, top + S))]
        return torch.stack([c.preparation.normalise(tile) for tile in tiles])

    def forward(self, tiles: Tensor, size: tuple[int, int]) -> Seen:
        """Tiles (T, 3, S, S) of a picture of this width and height."""
        c, projector = self.config, self.multi_modal_projector
        x = torch.cat(self.vision_tower(tiles, c.behind), dim=-1)[:, int(c.drop_first) :]
        x = projector["linear_2"](ACTIVATIONS[c.hidden_act](projector["linear_1"](x)))  # (T, g * g, D)
        return Seen(self.pack(x, size) if c.pinpoints else x[0])

    def pack(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(T, g * g, D) -> (n, D): the first tile, then the rows across all others, a newline behind each.

        Rows, or columns, that hold nothing but padding are left out.
        """
        c, (w, h) = self.config, size
        H, W = (side // c.tower.image_size for side in best_pinpoint(size, c.pinpoints))  # in tiles
        first, x = x[0], x[1:].unflatten(1, (c.tower.grid, -1)).unflatten(0, (H, W))
        x = x.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (rows, columns, D)
        rows, columns = x.shape[:2]
        if w / h > columns / rows:
            cut = (rows - int(round(h * (columns / w), 7))) // 2
            x = x[cut : rows - cut]
        else:
            cut = (columns - int(round(w * (rows / h), 7))) // 2
            x = x[:, cut : columns - cut]
        x = torch.cat((x, self.image_newline.expand(len(x), 1, -1)), dim=1)
        return torch.cat((first, x.flatten(0, 1)))


# ---- Qwen3-VL ----


@dataclass(frozen=True)
class Qwen3VLConfig:
    """The fields of a Qwen3-VL's files that decide what is computed, with the defaults of transformers."""

    preparation: Preparation
    pixels: tuple[int, int]  # a picture is resized to no fewer and no more
    deepstack: list[int]  # behind these layers, patches are merged for the language model's first ones
    hidden_act: str
    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    patch_size: int = 16
    temporal_patch_size: int = 2  # a picture is a film of so many equal frames
    spatial_merge_size: int = 2  # m: m x m patches become one placeholder
    num_position_embeddings: int = 2304
    out_hidden_size: int = 3584  # D


class Qwen3VLBlock(nn.Module):
    """(N, h) -> (N, h); all patches of a picture see one another."""

    def __init__(self, c: Qwen3VLConfig):
        super().__init__()
        h, m = c.hidden_size, c.intermediate_size
        self.norm1, self.norm2 = nn.LayerNorm(h, 1e-6), nn.LayerNorm(h, 1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(h, 3 * h), "proj": nn.Linear(h, h)})
        self.mlp = nn.ModuleDict({"linear_fc1": nn.Linear(h, m), "linear_fc2": nn.Linear(m, h)})
        self.heads, self.act = c.num_heads, ACTIVATIONS[c.hidden_act]

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q, k, v = (y.transpose(0, 1)[None] for y in (apply_rope(q, rope), apply_rope(k, rope), v))
        y = F.scaled_dot_product_attention(q, k, v)[0]  # (heads, N, h / heads)
        x = x + self.attn["proj"](y.transpose(0, 1).flatten(1))
        return x + self.mlp["linear_fc2"](self.act(self.mlp["linear_fc1"](self.norm2(x))))


class Qwen3VLMerger(nn.Module):
    """(N, h) -> (n, D): m * m patches in a row become one; the norm stands before that, or behind."""

    def __init__(self, c: Qwen3VLConfig, norm_behind: bool):
        super().__init__()
        wide = c.hidden_size * c.spatial_merge_size**2
        self.norm = nn.LayerNorm(wide if norm_behind else c.hidden_size, 1e-6)
        self.linear_fc1, self.linear_fc2 = nn.Linear(wide, wide), nn.Linear(wide, c.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.reshape(-1, *self.norm.normalized_shape))
        return self.linear_fc2(F.gelu(self.linear_fc1(x.reshape(-1, self.linear_fc1.in_features))))


class Qwen3VL(nn.Module):
    """A tower for pictures of any shape; mergers at its end, and behind some of its layers (deepstack)."""

    def __init__(self, c: Qwen3VLConfig):
        super().__init__()
        self.config = c
        kernel = (c.temporal_patch_size, c.patch_size, c.patch_size)
        deep = [Qwen3VLMerger(c, norm_behind=True) for _ in c.deepstack]
        parts = {
            "patch_embed": nn.ModuleDict({"proj": nn.Conv3d(3, c.hidden_size, kernel, kernel)}),
            "pos_embed": nn.Embedding(c.num_position_embeddings, c.hidden_size),
            "blocks": nn.ModuleList(Qwen3VLBlock(c) for _ in range(c.depth)),
            "merger": Qwen3VLMerger(c, norm_behind=False),
            "deepstack_merger_list": nn.ModuleList(deep),
        }
        self.visual = nn.ModuleDict(parts)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of a picture of this width and height: whole blocks of m x m."""
        c, (w, h) = self.config, size
        least, most = c.pixels
        f = c.patch_size * c.spatial_merge_size
        sides = [round(side / f) * f for side in (h, w)]
        if math.prod(sides) > most:
            shrink = math.sqrt(h * w / most)
            sides = [max(f, math.floor(side / shrink / f) * f) for side in (h, w)]
        elif math.prod(sides) < least:
            grow = math.sqrt(least / (h * w))
            sides = [math.ceil(side * grow / f) * f for side in (h, w)]
        return sides[0] // c.patch_size, sides[1] // c.patch_size

    def by_blocks(self, x: Tensor) -> Tensor:
        """(rows, columns, ...) -> (N, ...): block by block, for the mergers."""
        m = self.config.spatial_merge_size
        x = x.unflatten(1, (-1, m)).unflatten(0, (-1, m))  # (rows / m, m, columns / m, m, ...)
        return x.transpose(1, 2).flatten(0, 3)

    def pixels(self, picture: Image.Image) -> Tensor:
        """RGB -> patches (N, 3 * temporal_patch_size * patch_size ** 2)."""
        c, (rows, columns) = self.config, self.grid(picture.size)
        p = c.patch_size
        picture = picture.resize((columns * p, rows * p), c.preparation.resample)
        x = c.preparation.normalise(picture).unflatten(2, (columns, p)).unflatten(1, (rows, p))
        x = self.by_blocks(x.permute(1, 3, 0, 2, 4))  # (N, 3, p, p)
        return x[:, :, None].expand(-1, -1, c.temporal_patch_size, -1, -1).flatten(1)

    def rope(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines (N, 1, d/2): half of a head's pairs turn with the row, half with the column."""
        d = self.config.hidden_size // self.config.num_heads
        frequency = 1e4 ** (-torch.arange(0, d // 2, 2, device=device) / (d // 2))  # (d/4,)
        row, column = (torch.arange(n, device=device) for n in (rows, columns))
        place = torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1)  # (rows, columns, 2)
        angle = (self.by_blocks(place)[..., None] * frequency).flatten(1)[:, None]
        return angle.cos(), angle.sin()

    def forward(self, patches: Tensor, size: tuple[int, int]) -> Seen:
        """Patches (N, ...) of a picture of this width and height."""
        c, visual, grid = self.config, self.visual, self.grid(size)
        proj, table = visual["patch_embed"]["proj"], visual["pos_embed"].weight.float()
        table = table.T.unflatten(1, (math.isqrt(c.num_position_embeddings), -1))  # (h, side, side)
        positions = F.interpolate(table[None], grid, mode="bilinear", align_corners=True)[0]
        x = F.linear(patches, proj.weight.flatten(1), proj.bias)  # the convolution, on patches cut already
        x = x + self.by_blocks(positions.permute(1, 2, 0)).to(x)
        rope, deepstack = self.rope(*grid, x.device), []
        for i, block in enumerate(visual["blocks"]):
            x = block(x, rope)
            if i in c.deepstack:
                deepstack.append(visual["deepstack_merger_list"][len(deepstack)](x))
        merged = tuple(n // c.spatial_merge_size for n in grid)
        return Seen(visual["merger"](x), deepstack, merged)


# ---- Any of them ----


class Vision:
    """A frozen tower and its projector; `placeholder_id` stands in the text where a picture is seen."""

    def __init__(self, model: Llava | Qwen3VL, placeholder_id: int):
        self.model, self.placeholder_id = model, placeholder_id

    @torch.no_grad()
    def look(self, picture: Image.Image) -> Seen:
        """What the language model reads of a picture; ValueError if it is too thin."""
        picture = on_white(picture)
        pixels = self.model.pixels(picture)
        seen = self.model(pixels.to(next(self.model.parameters())), picture.size)
        return dataclasses.replace(seen, placeholder_id=self.placeholder_id)


# ---- Reading a folder ----

FILES = ["config.json", "processor_config.json", "preprocessor_config.json"]
FILES += ["*.safetensors", "model.safetensors.index.json"]
# What stock folders leave out. SigLIP where it differs from CLIP; LLaVA's tower where no vision_config is.
TOWERS = {
    "clip_vision_model": TowerConfig(),
    "siglip_vision_model": TowerConfig(
        clip=False, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6
    ),
}
CLIP_LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
CLIP_LARGE |= dict(patch_size=14, image_size=336)
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# Fields that change nothing here.
UNUSED = """
    architectures dtype torch_dtype transformers_version model_type text_config vision_config vocab_size
    tie_word_embeddings use_cache ignore_index bos_token_id eos_token_id pad_token_id image_seq_length
    attention_dropout initializer_factor initializer_range projection_dim
    image_processor_type feature_extractor_type processor_class do_convert_rgb default_to_square
    data_format input_data_format return_tensors device disable_grouping
    video_token_id vision_start_token_id vision_end_token_id
""".split()


class Fields:
    """A JSON object whose fields are taken one by one; ValueError names one that does not fit or is unknown.

    A field that is null counts as left out.
    """

    def __init__(self, path: Path, raw: object, prefix: str = ""):
        self.path, self.prefix, self.known = path, prefix, set(UNUSED)
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: {prefix.rstrip('.')} is not a JSON object")
        self.raw = {name: value for name, value in raw.items() if value is not None}

    def refuse(self, field: str, wanted: str) -> NoReturn:
        shown = f"{self.path}: {self.prefix}{field} = {json.dumps(self.raw.get(field))}"
        raise ValueError(f"{shown} is not supported; {wanted}")

    def take(self, field: str, default: object, fits: Callable[[object], bool], wanted: str) -> object:
        self.known.add(field)
        value = self.raw.get(field, default)
        return value if fits(value) else self.refuse(field, wanted)

    def choice(self, field: str, default: object, *choices: object) -> object:
        text = partial(json.dumps, sort_keys=True)  # what is compared: true is not 1
        allowed = list(map(text, choices))
        return self.take(field, default, lambda x: text(x) in allowed, f"only {', '.join(allowed)} is")

    def count(self, field: str, default: int | None = None, least: int = 1) -> int:
        wanted = f"a whole number from {least} on is"
        return self.take(field, default, lambda x: type(x) is int and least <= x < 2**28, wanted)

    def finish(self) -> None:
        """Nothing else may be set."""
        for field in sorted(self.raw.keys() - self.known):
            if not field.startswith("_"):
                self.refuse(field, "no such field is known")


def is_number(x: object) -> bool:
    return type(x) in (int, float) and 0 < x < 1e6


def is_square(x: object) -> bool:
    """{"shortest_edge": n} or {"height": n, "width": n}."""
    if not isinstance(x, dict) or set(x) not in ({"shortest_edge"}, {"height", "width"}):
        return False
    return all(type(n) is int and 0 < n < 2**15 for n in x.values()) and len(set(x.values())) == 1


def image_processor(folder: Path, *choices: str) -> tuple[Fields, str]:
    """The settings of the image processor, and its name, one of the choices; the first if it says none.

    transformers 5 keeps them in the first of the two files. The name's end says how it computes.
    """
    path = folder / "processor_config.json"
    if path.is_file() and "image_processor" in (raw := read_json(path)):
        fields = Fields(path, raw["image_processor"], "image_processor.")
    else:
        path = folder / "preprocessor_config.json"
        fields = Fields(path, read_json(path))
    field = next((f for f in ("image_processor_type", "feature_extractor_type") if f in fields.raw), "")
    name = str(fields.raw.get(field, choices[0])).removesuffix("Fast").removesuffix("Pil")
    name = name.removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if name not in choices:
        fields.refuse(field, f"only {' and '.join(f'{c}ImageProcessor' for c in choices)} are")
    return fields, name


def read_preparation(fields: Fields, mean: list[float], std: list[float]) -> Preparation:
    """The fields that all image processors have, with the defaults of one of them."""
    for field in ("do_resize", "do_rescale", "do_normalize"):
        fields.choice(field, True, True)

    def are_three(x: object) -> bool:
        return isinstance(x, list) and len(x) == 3 and all(y == 0 or is_number(y) for y in x)

    resample = fields.choice("resample", 3, *map(int, Image.Resampling))
    factor = fields.take("rescale_factor", 1 / 255, is_number, "a positive number is")
    mean = fields.take("image_mean", mean, are_three, "a list of three numbers is")
    wanted = "a list of three positive numbers is"
    std = fields.take("image_std", std, lambda x: are_three(x) and min(x) > 0, wanted)
    return Preparation(resample, factor, mean, std)


def read_tower(path: Path, raw: object) -> TowerConfig:
    """A LLaVA's `vision_config`."""
    fields = Fields(path, CLIP_LARGE if raw is None else raw, "vision_config.")
    usual = TOWERS[fields.choice("model_type", "clip_vision_model", *TOWERS)]
    whole = {name: fields.count(name, x) for name, x in dataclasses.asdict(usual).items() if type(x) is int}
    fields.choice("num_channels", 3, 3)
    eps = fields.take("layer_norm_eps", usual.layer_norm_eps, is_number, "a positive number is")
    act = fields.choice("hidden_act", usual.hidden_act, *ACTIVATIONS)
    c = dataclasses.replace(usual, **whole, layer_norm_eps=eps, hidden_act=act)
    if not c.clip:
        c = dataclasses.replace(c, vision_use_head=fields.choice("vision_use_head", True, True, False))
    if c.hidden_size % c.num_attention_heads:
        fields.refuse("num_attention_heads", f"divisors of hidden_size = {c.hidden_size} are")
    if not c.grid:
        fields.refuse("image_size", f"patch_size = {c.patch_size} and more is")
    fields.finish()
    return c


def read_llava(folder: Path, fields: Fields) -> tuple[Llava, int]:
    """The model without its weights, and the placeholder's id."""
    tower = read_tower(fields.path, fields.raw.get("vision_config"))
    text = Fields(fields.path, fields.raw.get("text_config", {}), "text_config.")
    usual = text.raw.get("model_type", "llama") in ("llama", "mistral", "qwen2", "qwen3")
    L, S, tiled = tower.num_hidden_layers, tower.image_size, fields.raw["model_type"] == "llava_next"

    def are_layers(x: object) -> bool:
        x = x if isinstance(x, list) else [x]
        return len(x) > 0 and all(type(i) is int and -L - 1 <= i <= L for i in x)

    wanted = f"a number from {-L - 1} to {L} for {L} layers, or a list of such, is"
    layers = fields.take("vision_feature_layer", -2, are_layers, wanted)
    layers = layers if isinstance(layers, list) else [layers]
    strategy = fields.choice("vision_feature_select_strategy", "default", "default", "full")
    if tiled and (strategy == "default") != tower.clip:
        fields.refuse("vision_feature_select_strategy", '"default" with CLIP and "full" with SigLIP is')
    placeholder = fields.count("image_token_index", 32000, least=0)
    placeholder = fields.count("image_token_id", placeholder, least=0)
    pinpoints = None
    if tiled:
        fields.choice("use_image_newline_parameter", True, True)
        pinpoints = read_pinpoints(fields, S)
    config = LlavaConfig(
        tower,
        text_size=text.count("hidden_size", 4096 if usual else None),
        behind=[i if i >= 0 else L + 1 + i for i in layers],
        drop_first=strategy == "default",
        hidden_act=fields.choice("projector_hidden_act", "gelu", *ACTIVATIONS),
        bias=fields.choice("multimodal_projector_bias", True, True, False),
        pinpoints=pinpoints,
        **read_llava_processor(folder, S, pinpoints),
    )
    fields.finish()
    return Llava(config), placeholder


def read_pinpoints(fields: Fields, S: int) -> list[list[int]]:
    """The sizes (height, width) to choose from, in pixels."""

    def is_size(x: object) -> bool:
        return isinstance(x, list) and len(x) == 2 and all(type(n) is int and n > 0 and n % S == 0 for n in x)

    def fits(x: object) -> bool:
        return isinstance(x, list) and len(x) > 0 and all(map(is_size, x))

    wanted = f"a list of heights and widths that are multiples of the tower's {S} pixels is"
    return fields.take("image_grid_pinpoints", PINPOINTS, fits, wanted)


def read_llava_processor(folder: Path, S: int, pinpoints: list[list[int]] | None) -> dict:
    """What LlavaConfig needs of the image processor, whose tiles must be as large as the tower's."""
    fields, name = image_processor(folder, *(["LlavaNext"] if pinpoints else ["Llava", "CLIP", "Siglip"]))
    half, square = [0.5] * 3, {"height": 224, "width": 224}
    siglip, wanted = name == "Siglip", f"the tower sees tiles of {S} x {S} pixels"
    preparation = read_preparation(fields, *((half, half) if siglip else (CLIP_MEAN, CLIP_STD)))
    crop = fields.choice("do_center_crop", not siglip, True, False)
    form = 'only {"shortest_edge": n} and {"height": n, "width": n} are'
    size = fields.take("size", square if siglip else {"shortest_edge": 224}, is_square, form)
    cut = fields.take("crop_size", square, is_square, form)
    edge, squash, cut = max(size.values()), "height" in size, max(cut.values())
    if cut != S and (crop or pinpoints):
        fields.refuse("crop_size", wanted)
    if edge < S or (edge > S and (pinpoints or not crop)) or not (squash or crop or pinpoints):
        fields.refuse("size", wanted)
    if pinpoints:
        fields.choice("do_pad", True, True, False)  # of tiles in a batch
        if read_pinpoints(fields, S) != pinpoints:
            fields.refuse("image_grid_pinpoints", f"config.json has {pinpoints}")
    else:
        fields.choice("do_pad", False, False)  # to a square, which no stock folder does
    fields.finish()
    return dict(preparation=preparation, edge=edge, squash=squash)


def read_qwen3_vl(folder: Path, fields: Fields) -> tuple[Qwen3VL, int]:
    """The model without its weights, and the placeholder's id."""
    placeholder = fields.count("image_token_id", 151655, least=0)
    fields.finish()
    text = Fields(fields.path, fields.raw.get("text_config", {}), "text_config.")
    vision = Fields(fields.path, fields.raw.get("vision_config", {}), "vision_config.")
    vision.choice("model_type", "qwen3_vl_vision", "qwen3_vl_vision", "qwen3_vl")
    vision.choice("in_channels", 3, 3)
    plain = {"rope_type": "axial", "rope_theta": 10000.0}
    vision.choice("rope_parameters", plain, plain)
    sizes = [f for f in dataclasses.fields(Qwen3VLConfig) if isinstance(f.default, int)]
    size = {f.name: vision.count(f.name, f.default) for f in sizes}
    depth, heads, places = (size[n] for n in ("depth", "num_heads", "num_position_embeddings"))

    def rises(x: object) -> bool:
        whole = isinstance(x, list) and all(type(i) is int and 0 <= i < depth for i in x)
        return whole and x == sorted(set(x))

    wanted = f"rising numbers below {depth} are"
    deepstack = vision.take("deepstack_visual_indexes", [8, 16, 24], rises, wanted)
    act = vision.choice("hidden_act", "gelu_pytorch_tanh", *ACTIVATIONS)
    if size["hidden_size"] % (4 * heads):
        vision.refuse("num_heads", f"numbers that cut {size['hidden_size']} into multiples of 4 are")
    if math.isqrt(places) ** 2 != places:
        vision.refuse("num_position_embeddings", "square numbers are")
    if text.count("hidden_size", 4096) != size["out_hidden_size"]:
        vision.refuse("out_hidden_size", f"text_config has {text.count('hidden_size', 4096)}")
    vision.finish()
    rest = read_qwen3_vl_processor(folder, size)
    return Qwen3VL(Qwen3VLConfig(**size, **rest, deepstack=deepstack, hidden_act=act)), placeholder


def read_qwen3_vl_processor(folder: Path, size: dict[str, int]) -> dict:
    """What Qwen3VLConfig needs of the image processor, which must cut patches as the tower does."""
    fields, _ = image_processor(folder, "Qwen2VL")
    preparation = read_preparation(fields, CLIP_MEAN, CLIP_STD)
    usual = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    for name, ours in zip(usual, ("patch_size", "temporal_patch_size", "spatial_merge_size"), strict=True):
        if fields.count(name, usual[name]) != size[ours]:
            fields.refuse(name, f"vision_config has {size[ours]}")

    def is_range(x: object) -> bool:
        whole = isinstance(x, dict) and set(x) == {"shortest_edge", "longest_edge"}
        return whole and all(type(n) is int and 0 < n < 2**40 for n in x.values())

    # Whatever they are called, these are numbers of pixels of a picture. Older files say it in other fields.
    edges = {"shortest_edge": 56**2, "longest_edge": 28**2 * 1280}
    wanted = 'only {"shortest_edge": pixels, "longest_edge": pixels} is'
    edges = fields.take("size", edges, is_range, wanted)
    least = fields.count("min_pixels", edges["shortest_edge"])
    most = fields.count("max_pixels", edges["longest_edge"], least)
    fields.finish()
    return dict(preparation=preparation, pixels=(least, most))


FAMILIES = {"llava": read_llava, "llava_next": read_llava, "qwen3_vl": read_qwen3_vl}


def vision_tensors(folder: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Exactly the expected tensors beside the language model's; ValueError names the first that is wrong."""

    def our_name(stored: str) -> str | None:
        """Versions of transformers differ in whether they write these parts of a name."""
        name = stored.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.", 1)
        others = name.startswith(("language_model.", "lm_head.")) or name.endswith("embeddings.position_ids")
        return None if others else name

    where = open_weights(folder)
    found = match_tensors(where, expected, folder, our_name)
    return {name: where[stored][1].get_tensor(stored) for name, stored in found.items()}


def load_vision(
    folder_or_hub_id: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Vision:
    """The frozen eyes of a stock vision-language model; ValueError names what does not fit."""
    folder = resolve(folder_or_hub_id, files=FILES)
    fields = Fields(folder / "config.json", read_json(folder / "config.json"))
    family = fields.choice("model_type", None, *FAMILIES)
    with torch.device("meta"):  # shapes only; the file's tensors then take their places
        model, placeholder_id = FAMILIES[family](folder, fields)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    model.load_state_dict(vision_tensors(folder, expected), assign=True)
    return Vision(model.to(device, dtype).eval().requires_grad_(False), placeholder_id)
