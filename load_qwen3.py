"""A stock Hugging Face Qwen3 -> an LMFusion with its text half filled, and the tokenizer.

    model = load_qwen3("Qwen/Qwen3-0.6B")          # a hub id or a folder
    tokenizer = load_tokenizer("Qwen/Qwen3-0.6B")

Llama (the paper's base) and Qwen2 folders load as well: three switches of the same layer, see `MODEL_TYPES`.
Of a vision-language model (`VLM_TYPES`) it is the language model; its eyes are `vision.load_vision`'s.

A folder holds `config.json`, `tokenizer.json`, and the weights as `model.safetensors` or as shards listed in
`model.safetensors.index.json`. Every tensor is accounted for by name and shape; anything else is a ValueError
that names it. `model.layers.3.mlp.up_proj.weight` is `layers.3.text.mlp.up_proj.weight` here.
"""

import hashlib
import json
import operator
import os
import re
import reprlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from model import Expert, LMFusion, ModelConfig, replace
from scale.parallel import alike, fill, full_tensor

BOI, EOI = "<|vision_start|>", "<|vision_end|>"  # Qwen3's own; their frozen embedding rows serve as they are
# Our choice, for other bases: special tokens that their text does not use. The first pair that is there.
PAIRS = (
    (BOI, EOI),  # Qwen3, Qwen2.5
    ("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),  # Llama 3
    ("<issue_start>", "<issue_closed>"),  # SmolLM2 (a Llama)
)
# What a `model_type` of Hugging Face means here: switches of the layer, and what config.json may omit.
MODEL_TYPES = {
    "qwen3": dict(qk_norm=True, attention_bias=False, head_dim=128),  # head_dim: never hidden_size / heads
    "qwen2": dict(qk_norm=False, attention_bias=True),
    "llama": dict(qk_norm=False, attention_bias=False),
}
# The language models of vision-language models, and what their text_config means where it says nothing.
LLAMA = dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, eos_token_id=2)
LLAMA |= dict(num_hidden_layers=32, num_attention_heads=32, max_position_embeddings=2048)
MISTRAL = LLAMA | dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=2**17)
QWEN2 = LLAMA | dict(model_type="qwen2", vocab_size=151936, intermediate_size=22016, eos_token_id=None)
QWEN2 |= dict(num_key_value_heads=32, max_position_embeddings=32768)
QWEN3 = QWEN2 | dict(model_type="qwen3")
QWEN3_VL = QWEN3 | dict(max_position_embeddings=128000, mrope_section=[24, 20, 20])
LLAVA = {"llama": LLAMA, "mistral": MISTRAL | dict(sliding_window=4096), "qwen2": QWEN2, "qwen3": QWEN3}
VLM_TYPES = {"llava": LLAVA, "llava_next": LLAVA, "qwen3_vl": {"qwen3_vl_text": QWEN3_VL}}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# The stock checkpoints, for a dry run without a download: hidden, intermediate size, layers, heads, tied.
STOCK = {
    "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, True),
    "Qwen/Qwen3-1.7B": (2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": (2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": (4096, 12288, 36, 32, False),
}
COUNTS = (*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings")
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
MUST_BE_FALSE = ("mlp_bias", "attention_bias", "use_sliding_window")  # Qwen2's own bias is on Q, K, V alone

ROOT = Path(__file__).resolve().parent
SHIPPED = ("small/base", "small/checkpoint")  # what the repository itself holds, wherever it lies

# ---- Folders and files ----


MOVED = "; if it was moved, say with --base (of a VAE: --vae) where it lies now"


def resolve(
    folder_or_hub_id: str | Path, weights: bool = True, files: list[str] | None = None, hint: str = MOVED
) -> Path:
    """A folder as it is; a hub id ("owner/name") downloaded, only the `files` needed; or ValueError."""
    name, folder = str(folder_or_hub_id), Path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    if name in SHIPPED and (ROOT / name).is_dir():
        return ROOT / name
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ValueError(f"{name}: no such folder, and not a hub id of the form owner/name{hint}")
    from huggingface_hub import snapshot_download

    if files is None:
        files = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
        files += ["*.safetensors", "model.safetensors.index.json"] if weights else []
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub raises many kinds; for the user they are one
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"{name}: no such folder, and it could not be downloaded from the hub"
        raise ValueError(f"{what}: {reason}{hint}") from None


def address(folder_or_hub_id: str) -> str:
    """A folder's whole path; a hub id, or the name of what the repository holds, as it is."""
    if not Path(folder_or_hub_id).is_dir():
        return folder_or_hub_id
    path = Path(folder_or_hub_id).resolve()
    return next((name for name in SHIPPED if path == ROOT / name), str(path))


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError if it is missing, not JSON, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def open_safetensors(path: Path) -> safe_open:
    """`safe_open` with errors a user can read."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with open(path, "rb"):  # for the library, a file that may not be read is one that is not there
            return safe_open(str(path), framework="pt")
    except PermissionError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


# ---- config.json ----


def read_config(folder: Path) -> dict:
    """ModelConfig's language-model fields from `config.json`; ValueError names what is not built."""
    path = folder / "config.json"
    raw, prefix = read_json(path), ""
    if str(raw.get("model_type")) in VLM_TYPES:
        raw, prefix = read_text_config(path, raw), "text_config."

    def refuse(field: str, wanted: str) -> None:
        shown = f"{path}: {prefix}{field} = {json.dumps(raw.get(field))}"
        raise ValueError(f"{shown} is not supported; {wanted}")

    kind = MODEL_TYPES.get(str(raw.get("model_type")))
    if kind is None:
        refuse("model_type", f"only dense {', '.join(map(json.dumps, MODEL_TYPES))} are")
    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", 'only "silu" is')
    for field in MUST_BE_FALSE:
        if raw.get(field) and not kind.get(field):
            refuse(field, "only false is")
    if raw.get("quantization_config"):
        refuse("quantization_config", "only unquantised weights are")
    for field in ("num_experts", "num_local_experts"):
        if raw.get(field):
            refuse(field, "mixtures of experts are not built")
    layer_types = raw.get("layer_types")
    if layer_types and (not isinstance(layer_types, list) or any(x != "full_attention" for x in layer_types)):
        refuse("layer_types", 'only "full_attention" is')
    theta, scaling, mrope = read_rope(raw, refuse)

    if missing := [f"{prefix}{f}" for f in SIZES if raw.get(f) is None]:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    taken = (*COUNTS, "rms_norm_eps", "tie_word_embeddings")
    fields = {**kind, **{f: raw[f] for f in taken if raw.get(f) is not None}}
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields.setdefault("tie_word_embeddings", False)
    fields |= {"rope_theta": theta, "rope_scaling": scaling, "mrope_section": mrope}
    for name, value in fields.items():
        shown = f"{path}: {prefix}{name} = {json.dumps(value)}"
        most = 2**12 if name == "num_hidden_layers" else 2**24  # to find that more are missing takes too long
        if name in COUNTS and (type(value) is not int or not 0 < value <= most):
            raise ValueError(f"{shown} is not a positive whole number up to {most}")
        if name in ("rms_norm_eps", "rope_theta") and not (type(value) in (int, float) and value > 0):
            raise ValueError(f"{shown} is not a positive number")
        if name == "tie_word_embeddings" and not isinstance(value, bool):
            raise ValueError(f"{shown} is neither true nor false")
    fields["rope_theta"] = float(theta)
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])  # Qwen2, Llama
    if fields["head_dim"] % 2:
        raise ValueError(f"{path}: {prefix}head_dim = {fields['head_dim']} is odd; RoPE turns pairs")
    ends, more = read_ends(path, raw), folder / "generation_config.json"
    every = ends + (read_ends(more, read_json(more)) if more.is_file() else [])
    return fields | {"eos_id": next(iter(ends), None), "end_ids": tuple(dict.fromkeys(every))}


def read_text_config(path: Path, raw: dict) -> dict:
    """A vision-language model's text_config, as `config.json` of its language model alone would have it."""
    known, text = VLM_TYPES[raw["model_type"]], raw.get("text_config", {})
    kind = text.get("model_type", next(iter(known))) if isinstance(text, dict) else None
    if str(kind) not in known:
        shown = f"{path}: text_config.model_type = {json.dumps(kind)} is not supported"
        raise ValueError(f"{shown}; only {', '.join(map(json.dumps, known))} are")
    tied = raw.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
    text = known[kind] | text | {"model_type": known[kind]["model_type"], "tie_word_embeddings": tied}
    if kind == "mistral" and text["sliding_window"] is not None:
        raise ValueError(f"{path}: text_config.sliding_window is not null; no other is supported")
    return text


def read_ends(path: Path, raw: dict) -> list[int]:
    """eos_token_id, one or several: the first of config.json ends documents, all end what is generated."""
    eos = raw.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(i) is not int or i < 0 for i in ends):
        raise ValueError(f"{path}: eos_token_id = {json.dumps(eos)} is not a token's id")
    return ends


def read_rope(raw: dict, refuse: Callable[[str, str], None]) -> tuple[object, tuple | None, tuple | None]:
    """rope_theta, and ModelConfig's rope_scaling and mrope_section, from the fields of `config.json`."""
    theta, scaling, mrope = raw.get("rope_theta"), None, raw.get("mrope_section")
    for field in ("rope_scaling", "rope_parameters"):  # transformers 5 writes theta in the second
        rope = raw.get(field)
        if not rope:
            continue
        form = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
        if form not in ("default", "llama3"):
            refuse(field, "only plain RoPE and llama3's are")
        if any(isinstance(value, dict) for value in rope.values()):
            refuse(field, "only one RoPE for all layers is")
        theta = rope.get("rope_theta", theta)
        if mrope:
            mrope = rope.get("mrope_section", mrope)
            three = isinstance(mrope, list) and [type(x) is int and x > 0 for x in mrope] == [True] * 3
            if not three or rope.get("mrope_interleaved", True) is not True:
                refuse(field, "mrope_section is three positive whole numbers, mrope_interleaved true")
        if form == "llama3":
            scaling = tuple(rope.get(name) for name in LLAMA3_ROPE)
            if any(type(x) not in (int, float) or not x > 0 for x in scaling) or scaling[1] >= scaling[2]:
                names = ", ".join(LLAMA3_ROPE)
                refuse(field, f"llama3's takes positive numbers {names}, the second the smaller")
    if mrope and theta is None:
        refuse("rope_theta", "versions of transformers differ in what its absence means")
    return 10000.0 if theta is None else theta, scaling, mrope and tuple(mrope)


def model_config(folder: Path, **overrides) -> ModelConfig:
    """The model that `config.json` and `tokenizer.json` describe; ValueError names what is wrong."""
    fields = read_config(folder)
    tokenizer = load_tokenizer(folder)
    fields["boi_id"], fields["eoi_id"] = image_tokens(tokenizer)
    if fields["eos_id"] is None:
        fields["eos_id"] = tokenizer.token_to_id("<|endoftext|>")
    if fields["eos_id"] is None:
        raise ValueError(f"{folder / 'config.json'}: no eos_token_id, and the tokenizer has no <|endoftext|>")
    config = replace(ModelConfig(**fields), **overrides)
    size = config.vocab_size
    if max(config.boi_id, config.eoi_id, config.eos_id) >= size:
        raise ValueError(f"{folder}: the tokenizer's special tokens lie beyond vocab_size = {size}")
    return config


def known_config(folder_or_hub_id: str) -> ModelConfig:
    """The model of a folder, or of a stock Qwen3 without asking the hub, with a default image side."""
    if folder_or_hub_id not in STOCK:
        return model_config(resolve(folder_or_hub_id, weights=False))
    *sizes, tied = STOCK[folder_or_hub_id]
    ids = dict(boi_id=151652, eoi_id=151653, eos_id=151645)
    return ModelConfig(151936, *sizes, 8, 128, tie_word_embeddings=tied, **ids)


# ---- The tokenizer ----


def load_tokenizer(folder_or_hub_id: str | Path) -> Tokenizer:
    """The folder's `tokenizer.json`, which must know one of PAIRS as special tokens; ValueError otherwise."""
    path = resolve(folder_or_hub_id, weights=False) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer file: {error}") from None
    image_tokens(tokenizer, path)
    tokenizer.no_truncation()  # some files store how a batch was once cut and filled
    tokenizer.no_padding()
    return tokenizer


@lru_cache
def tokenizer_identity(folder: Path) -> str:
    """SHA-256 of what `tokenizer.json` makes of a text; how the file is laid out does not matter."""
    raw = read_json(folder / "tokenizer.json")
    raw = {name: value for name, value in raw.items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def image_tokens(tokenizer: Tokenizer, path: Path | str = "tokenizer.json") -> tuple[int, int]:
    """Ids of BOI and EOI: the first of PAIRS that the tokenizer knows as special tokens, or ValueError."""
    special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    for boi, eoi in PAIRS:
        if boi in special and eoi in special:
            return special[boi], special[eoi]
    raise ValueError(f"{path}: has none of these pairs of special tokens: {', '.join(map(' '.join, PAIRS))}")


@lru_cache(maxsize=4)  # a Tokenizer is hashed and compared by identity
def added_tokens(tokenizer: Tokenizer) -> tuple[re.Pattern, dict[int, str]]:
    """The first character of an added token where all of it stands; and the added tokens by id."""
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    first = [f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in added.values()]
    return re.compile("|".join(first) or "(?!)"), added


def encode_plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text in which no added token is recognised, be it special (<|im_end|>) or not (<think>).

    `tokenizer.encode_special_tokens` holds back only the special ones. So the text is cut behind the first
    character of every added token in it, also of those that overlap, and the parts are encoded apart: no part
    holds a whole one, and a byte-level tokenizer decodes the ids to the (normalised) text.

    An added token of one character cannot be cut, nor one that only the normaliser brings about: ValueError.
    """
    first, added = added_tokens(tokenizer)
    cuts = [0, *(match.end() for match in first.finditer(text)), len(text)]
    parts = (tokenizer.encode(text[a:b], add_special_tokens=False).ids for a, b in pairwise(cuts))
    ids = list(chain.from_iterable(parts))
    if not added.keys().isdisjoint(ids):
        token = next(added[i] for i in ids if i in added)
        raise ValueError(f"the text {reprlib.repr(text)} cannot be encoded without the added token {token!r}")
    return ids


# ---- Weights ----


def open_weights(folder: Path) -> dict[str, tuple[Path, safe_open]]:
    """Where each tensor of the folder is; ValueError for missing, corrupt or disagreeing files."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files, weight_map = [single], None
    if not single.is_file():
        if not index.is_file():
            raise ValueError(f"{folder}: neither {single.name} nor {index.name} is there")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: has no weight_map")
        if bad := [str(n) for n in weight_map.values() if not isinstance(n, str) or Path(n).name != n]:
            raise ValueError(f"{index}: {bad[0]!r} is not the name of a file beside it")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    where: dict[str, tuple[Path, safe_open]] = {}
    for path in files:
        file = open_safetensors(path)
        for name in file.keys():
            if name in where:
                raise ValueError(f"{path}: tensor {name} is also in {where[name][0].name}")
            where[name] = path, file
    for name in sorted(set(where) ^ set(where if weight_map is None else weight_map)):
        raise ValueError(f"{index}: tensor {name} is not in {'the index' if name in where else 'its file'}")
    return where


def match_tensors(
    where: dict[str, tuple[Path, safe_open]],
    expected: dict[str, tuple[int, ...]],
    place: Path,
    rename: Callable[[str], str | None] = str,
    fits: Callable[[tuple, tuple], bool] = operator.eq,
) -> dict[str, str]:
    """Our name -> the stored one, of exactly the expected tensors (our name -> shape), which hold floats.

    where: as `open_weights` gives it. rename: a stored name -> ours, or None for one that is passed over.
    fits(stored shape, expected shape). ValueError names the file (for a missing one `place`), the tensor, and
    what is wrong with it.
    """
    found: dict[str, str] = {}
    for stored, (path, file) in sorted(where.items()):
        name, part = rename(stored), file.get_slice(stored)
        if name is None:
            continue
        if name not in expected:
            raise ValueError(f"{path}: tensor {stored} is not one that belongs there")
        if name in found:
            raise ValueError(f"{path}: tensor {stored} is there twice, once by another name")
        shape, kind = tuple(part.get_shape()), part.get_dtype()
        if not fits(shape, expected[name]) or kind not in ("F16", "BF16", "F32", "F64"):
            raise ValueError(f"{path}: tensor {stored} is {kind} {shape}, not floats {expected[name]}")
        found[name] = stored
    for name in sorted(expected.keys() - found.keys()):
        raise ValueError(f"{place}: tensor {name} is missing")
    return found


def text_names(config: ModelConfig) -> dict[str, str]:
    """Hugging Face's name -> ours, of every text tensor."""
    with torch.device("meta"):
        experts = list(Expert(config).state_dict())
    names = {"model.embed_tokens.weight": "embed_tokens.weight", "model.norm.weight": "norm_text.weight"}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{n}": f"layers.{i}.text.{n}" for n in experts}
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = "lm_head.weight"
    return names


def text_tensors(folder: Path, model: LMFusion) -> Callable[[str], Tensor]:
    """A function from our name of a text tensor to it; ValueError for one that is not as it should be."""
    names, where, head = text_names(model.config), open_weights(folder), "lm_head.weight"
    shapes, theirs = model.state_dict(), {ours: name for name, ours in names.items()}
    has_eyes = any("language_model." in name for name in where)

    def plain_name(stored: str) -> str | None:
        """As a language model alone has it; None for what is of the eyes or, in old exports, derived."""
        name = stored.removeprefix("model.")
        if name.startswith("language_model."):
            name = name.removeprefix("language_model.").removeprefix("model.")
            name = name if name == head else f"model.{name}"
        else:
            name = stored if not has_eyes or stored == head else ""
        return None if not name or name.endswith("rotary_emb.inv_freq") else name

    # some exports keep the tied copy
    copied = model.config.tie_word_embeddings and head in map(plain_name, where)
    if copied:
        names[head] = "embed_tokens.weight"
    expected = {name: tuple(shapes[ours].shape) for name, ours in names.items()}
    found = match_tensors(where, expected, folder, plain_name)

    def read_stored(name: str) -> Tensor:
        return where[found[name]][1].get_tensor(found[name])

    if copied and not torch.equal(read_stored(head), read_stored(theirs["embed_tokens.weight"])):
        differs = f"{found[head]} differs from {found[theirs['embed_tokens.weight']]}"
        raise ValueError(f"{where[found[head]][0]}: {differs}, but tie_word_embeddings is true")
    return lambda ours: read_stored(theirs[ours])


def load_qwen3(
    folder_or_hub_id: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    prepare: Callable[[LMFusion], None] | None = None,
    **overrides,
) -> LMFusion:
    """An LMFusion ready to use: frozen text, image experts copied from it, a fresh U-Net.

    Text is mapped from its files, tensor by tensor: no second copy of the model is ever in memory.
    `overrides` change fields of ModelConfig (the image side, usually). `prepare` sees the model before it has
    memory; it may cut it among processes (`parallel.shard`). Raises ValueError with the name of the field,
    file or tensor for whatever does not fit.
    """
    folder = resolve(folder_or_hub_id)
    config = model_config(folder, **overrides)
    with torch.device("meta"):  # shapes only
        model = LMFusion(config)
    read = text_tensors(folder, model)
    if prepare is not None:
        prepare(model)
    materialise(model, read, dtype, device)
    return model


@torch.no_grad()
def materialise(model: LMFusion, read: Callable, dtype: torch.dtype, device: str = "cpu") -> None:
    """Make a model of the meta device real: `read(name)` gives a text tensor, frozen; a fresh image side.

    Text tensors that have the dtype already are taken as they come, mapped from their file. Of a model that
    `parallel.shard` has cut, each process keeps its slices.
    """

    def text(name: str) -> Tensor:
        return read(name).to(dtype)

    image, made = model.image_parameters(), {}
    for name, p in model.text_parameters().items():
        made[p] = nn.Parameter(alike(p, text(name), device))
    for name, value in model.image_at_start(text):  # copied: of their own memory, even where text is mapped
        made[image[name]] = nn.Parameter(alike(image[name], value.to(dtype, copy=True), device))
    shared = model.named_parameters(remove_duplicate=False)  # shared parameters stay shared
    model.load_state_dict({name: made[p] for name, p in shared}, assign=True)
    model.freeze_text()


@torch.no_grad()
def init_image(model: LMFusion) -> None:
    """Give every image parameter its first value. Of a model cut among processes, all must call it."""
    text, image = model.text_parameters(), model.image_parameters()
    for name, value in model.image_at_start(lambda name: full_tensor(text[name])):
        fill(image[name], value)


def base_fingerprint(folder: Path) -> str:
    """The identity of a base, which checkpoints record: SHA-256 of name, shape and float32 bits of its text.

    Two folders of the same weights have the same one, however these are stored. All of it is read once, and
    again where the size or time of a file has changed: the result is kept in the user's cache.
    """
    read_config(folder)  # or its error
    stats = {p.name: p.stat() for p in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = cache / "lmfusion" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or not ours
        known = json.loads(kept.read_text(encoding="utf-8"))
        if known["files"] == files and re.fullmatch("[0-9a-f]{64}", known["fingerprint"]):
            return known["fingerprint"]
    with torch.device("meta"):
        model = LMFusion(model_config(folder))
    digest, read = hashlib.sha256(), text_tensors(folder, model)
    for name in sorted(model.text_parameters()):
        value = read(name).float().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    found = {"files": files, "fingerprint": digest.hexdigest()}
    with suppress(OSError):  # a full disk, a home that is not ours: then it is computed again
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found["fingerprint"]
