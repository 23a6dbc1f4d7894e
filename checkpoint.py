"""Checkpoints: only what was trained, as safetensors and JSON, written beside and renamed.

    OUT/step-002000/model.safetensors       trained tensors: the image side (and the text, if it was trained)
                    ema.safetensors         their moving average, if it was asked for
                    optimizer.safetensors   the optimizer's state, by the names of the parameters
                    latents.safetensors     the linear stand-in for the VAE; of a real VAE, the latents' range
                    checkpoint.json         step, configuration, and the fingerprints of the base and the VAE
                    README.md, sheet-*.png  of a finished run: a model card (lab/watch.py)

N processes write N files of each of the first three, model-00001-of-0000N.safetensors, whole tensors in turn;
any number of processes reads them. A folder `step-*` is whole or not there at all: a kill at any moment
leaves the last good one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import reprlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from config import TrainConfig, flag_name, lr_factor, restore_config
from diffusion import Diffusion
from load_qwen3 import (
    ROOT,
    SHIPPED,
    address,
    base_fingerprint,
    load_qwen3,
    load_tokenizer,
    match_tensors,
    open_safetensors,
    read_json,
    resolve,
    tokenizer_identity,
)
from model import LMFusion
from scale.parallel import Team, alike, fill, full_tensor
from scale.vae import AutoencoderKL, PatchPCA, load_vae

if TYPE_CHECKING:
    from train import Run

# what the fields of checkpoint.json are
KINDS = dict(step=int, base=str, fingerprint=str, model=dict, diffusion=dict, trained=list, config=dict)
KINDS |= dict(optimizer=list, vae=dict | None, tokenizer=str, sources=dict)
FORMAT = 1  # of checkpoint.json; checkpoints of before it was written there have it as well
# of a checkpoint on the hub: all but the optimizer's state
SHARED = ["checkpoint.json", "latents.safetensors", "model*.safetensors", "ema*.safetensors"]
# each names the folder of the last run of `train.py --config ...`
LAST_RUNS = {"small": Path("runs/last-small"), "small-chat": Path("runs/last-small-chat")}


@dataclass
class Trained:
    """A model with all that belongs to it."""

    model: LMFusion
    tokenizer: Tokenizer
    diffusion: Diffusion
    codec: PatchPCA | AutoencoderKL
    info: dict  # checkpoint.json
    folder: Path


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a small file beside and rename it; OSError with the name of the file if that cannot be done."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error.strerror}") from None


def check_device(name: str) -> None:
    """ValueError for a device that is not there or does not compute."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def part_name(name: str, rank: int, size: int) -> str:
    """model.safetensors of one process; model-00001-of-00002.safetensors of the first of two."""
    stem, dot, ending = name.partition(".")
    return name if size == 1 else f"{stem}-{rank + 1:05d}-of-{size:05d}{dot}{ending}"


def write_folder(
    folder: Path,
    tensors: dict[str, dict[str, Tensor]],
    info: dict,
    info_name: str,
    extra: dict[str, str | bytes] | None = None,
    team: Team | None = None,
) -> None:
    """Write a folder of safetensors, one JSON file and `extra` files beside its final place, then rename it.

    All processes of a team call it, and write the tensors in turn. Raises OSError with the name of the
    folder, in all of them, if it cannot be done (a full disk); nothing half-written stays.
    """
    team = team or Team()
    beside = folder.with_name(f".{folder.name}.tmp")
    problems: list[BaseException] = []

    def attempt(work: Callable[[], None]) -> None:
        """Do it unless something went wrong before; keep what goes wrong."""
        if not problems:
            try:
                work()
            except BaseException as error:  # safetensors has an error type of its own for input and output
                problems.append(error)

    def write_others() -> None:
        for name, content in {info_name: json.dumps(info, indent=1) + "\n", **(extra or {})}.items():
            (beside / name).write_bytes(content.encode() if isinstance(content, str) else content)
            sync(beside / name)

    if team.is_main:
        shutil.rmtree(beside, ignore_errors=True)
    team.wait()
    attempt(lambda: beside.mkdir(parents=True, exist_ok=True))
    for name, group in tensors.items():
        mine, size = {}, team.size if len(group) >= team.size else 1  # every part must exist
        for i, (k, v) in enumerate(group.items()):
            value = full_tensor(v.detach())  # gathered from all, so all come by here, whatever went wrong
            if i % size == team.rank:
                mine[k] = value.cpu().contiguous()
        path = beside / part_name(name, team.rank, size)
        if mine:
            attempt(lambda mine=mine, path=path: save_file(mine, str(path), metadata={"format": "pt"}))
            attempt(lambda path=path: set_mode(path))
            attempt(lambda path=path: sync(path))
    if team.is_main:
        attempt(write_others)
    failed = team.total([float(len(problems))])[0]
    if team.is_main and not failed:
        attempt(lambda: os.rename(beside, folder))
    failed = team.total([float(len(problems))])[0]  # none goes on before the folder stands
    if failed:
        if team.is_main:
            shutil.rmtree(beside, ignore_errors=True)
        if problems and not isinstance(problems[0], Exception):  # Ctrl-C
            raise problems[0]
        reason = problems[0] if problems else "another process failed"
        raise OSError(f"{folder} could not be written: {reason}") from None


def set_mode(path: Path) -> None:
    """As any new file of this user: safetensors' own may be read by nobody else."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """As the only process that writes in `folder`, which is made; left empty, it is removed at the end.

    ValueError if another process is at it, OSError if the folder cannot be made or written in. The kernel
    ends the lock with its process, killed or not.
    """
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b", buffering=0)
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error.strerror}") from None
    with file:
        if not lock(file):
            file.seek(0)
            owner = f"another process ({file.read().decode() or 'unknown'})"
            raise ValueError(f"{folder}: {owner} writes there; wait for its end, or give another --out")
        if not os.fstat(file.fileno()).st_nlink:  # its last owner has just removed it: others lock another
            with locked(folder):
                yield
            return
        try:
            try:
                file.truncate(0)
                file.write(str(os.getpid()).encode())
            except OSError as error:  # a full disk
                raise OSError(f"{folder} cannot be written: {error.strerror}") from None
            yield
        finally:
            with suppress(OSError):  # not empty, or gone
                path.unlink()
                for made in missing:
                    made.rmdir()


def lock(file: IO) -> bool:
    """Lock a file among processes; False: another one has it. Where there are no locks, all get them."""
    with suppress(ImportError, OSError):  # on Windows; on some file systems of clusters
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def sync(path: Path) -> None:
    """On the disk, not only on its way there."""
    with open(path, "r+b") as f:  # Windows syncs no file that was opened to be read
        os.fsync(f.fileno())


def commit(folder: Path = ROOT) -> str:
    """The commit of the code; a "+" behind it says that Python files differ from it (results may)."""

    def git(*args: str) -> str:
        how = dict(cwd=folder, capture_output=True, encoding="utf-8", check=True)
        return subprocess.run(["git", *args], **how).stdout

    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + "+" * bool(git("status", "-s", "--", "*.py"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def list_checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    ours = (p for p in out.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name))  # no copies of them
    found = [p for p in ours if (p / "checkpoint.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def find_checkpoint(place: str | Path | None, config: str = "small") -> Path:
    """A checkpoint's own folder, a run's last one, or a hub id's; with None, that of `config`'s last run."""
    if place is None:
        if LAST_RUNS[config].is_file():
            place = LAST_RUNS[config].read_text(encoding="utf-8").strip()
        elif config == "small" and (ROOT / SHIPPED[1]).is_dir():
            place = ROOT / SHIPPED[1]
        else:
            raise ValueError(f"no --checkpoint given, and no run of `train.py --config {config}` yet")
    elif Path(place).parts[:1] != ("runs",):  # where runs of ours lie: no owner on the hub
        place = resolve(place, files=SHARED, hint="")
    folder = Path(place)
    if (folder / "checkpoint.json").is_file():
        return folder
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not (found := list_checkpoints(folder)):
        raise ValueError(f"{folder}: holds no checkpoint (no checkpoint.json, no step-* folder with one)")
    return found[-1]


def read_info(folder: Path) -> dict:
    """checkpoint.json; ValueError if it cannot be read, or was written by a newer version."""
    info = read_json(folder / "checkpoint.json")
    if info.get("format", FORMAT) != FORMAT:
        found = f"of format {info['format']!r}, and this program reads format {FORMAT}"
        raise ValueError(f"{folder / 'checkpoint.json'}: {found}")
    for name, kind in KINDS.items():
        parts = info[name] if isinstance(info.get(name), list) else []  # names of tensors
        if name in info and not (isinstance(info[name], kind) and all(isinstance(x, str) for x in parts)):
            wrong = f"not a checkpoint of this program: {name} is {reprlib.repr(info[name])}"
            raise ValueError(f"{folder / 'checkpoint.json'}: {wrong}")
    return info


def saved_config(folder: Path) -> dict:
    """The fields of TrainConfig that a checkpoint was made with; ValueError names one that does not fit."""
    return restore_config(read_info(folder).get("config"), folder / "checkpoint.json")


def first_stage(init_from: str) -> tuple[dict, dict]:
    """checkpoint.json of --init-from, and the configuration in it."""
    try:
        folder = find_checkpoint(init_from)
    except ValueError as error:
        raise ValueError(f"--init-from {error}; train a first stage there, or name another") from None
    return read_info(folder), saved_config(folder)


def read_tensors(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, or of its parts, mapped; ValueError names one whose name or shape is another."""
    files, where = [path], {}
    parts = sorted(path.parent.glob(f"{path.stem}-*-of-*.safetensors")) if not path.is_file() else []
    if parts:
        count = parts[0].stem.rpartition("-")[2]
        size = int(count) if count.isdigit() else 0
        files = [path.with_name(part_name(path.name, rank, size)) for rank in range(size)]
    for file in sorted(set(parts) - set(files)):
        raise ValueError(f"{file}: does not belong to the {size} parts beside it")
    for file in files:
        f = open_safetensors(file)
        where |= dict.fromkeys(f.keys(), (file, f))
    found = match_tensors(where, {name: tuple(x.shape) for name, x in expected.items()}, path)
    return {name: where[name][1].get_tensor(name) for name in found}


def load_codec(folder: Path, info: dict, channels: int, vae: str, device: str) -> PatchPCA | AutoencoderKL:
    """What made a checkpoint's latents: the linear stand-in, or its VAE (at `vae`, if moved)."""
    made, numbers = info.get("vae"), 3 * info["config"]["latent_patch"] ** 2
    shapes = dict(bound=(channels, 1, 1))
    if made is None:
        if vae:
            raise ValueError(f"{folder} was trained on linear latents; --vae {vae} does not belong to it")
        shapes |= dict(mean=(numbers,), basis=(numbers, channels), scale=(channels,))
    expected = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    tensors = read_tensors(folder / "latents.safetensors", expected)
    if made is None:
        return PatchPCA(**tensors)
    codec = load_vae(vae or made["path"], device=device)
    if codec.fingerprint() != made["fingerprint"]:
        found = f"fingerprint {codec.fingerprint()[:12]}, expected {made['fingerprint'][:12]}"
        what = f"{vae or made['path']} is not the VAE that {folder} was trained with"
        raise ValueError(f"{what} ({found}); name the right one with --vae")
    codec.bound = tensors["bound"]
    return codec


def load_trained(
    checkpoint: str | Path | None,
    base: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
    config: str = "small",
) -> Trained:
    """The model of a checkpoint (its moving average, if any) on its base (at `base` or `vae`, if moved).

    ValueError for another base, and for whatever is missing, cut short or of another shape.
    """
    folder = find_checkpoint(checkpoint, config)
    info = read_info(folder)
    try:
        base, overrides = base or info["base"], dict(info["model"])
        diffusion, wanted, trained = Diffusion(**info["diffusion"]), info["fingerprint"], info["trained"]
        overrides["unet_channels"] = tuple(overrides["unet_channels"])
        if not 0 < info["config"]["latent_patch"] < 2**12:
            raise TypeError("its latent_patch makes no sense")
        if made := info.get("vae"):
            made["path"] + made["fingerprint"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'checkpoint.json'}: not a checkpoint of this program: {error}") from None
    model, found = load_qwen3(base, **overrides), base_fingerprint(resolve(base))
    if found != wanted:
        prints = f"fingerprint {found[:12]}, expected {wanted[:12]}"
        what = f"{base} is not the language model that {folder} was trained on ({prints})"
        raise ValueError(f"{what}; name the right one with --base")
    check_tokenizer(folder, info, base, tokenizer_identity(resolve(base)))
    own = {name: torch.empty(p.shape, device="meta") for name, p in model.state_dict().items()}
    for name in trained:
        if name not in own:
            raise ValueError(f"{folder / 'checkpoint.json'}: trained tensor {name} is not one of the model's")
    file = folder / ("ema.safetensors" if info.get("ema") else "model.safetensors")
    # mapped from the file, in the place of what was made at first: there is no moment with both in memory
    model.load_state_dict(read_tensors(file, {n: own[n] for n in trained}), strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.requires_grad_(False).to(device=device, dtype=dtype).eval()
    codec = load_codec(folder, info, model.config.latent_channels, vae or "", device)
    info["base"] = base
    return Trained(model, load_tokenizer(base), diffusion, codec, info, folder)


# ---- A run: saved, resumed, and the beginning of a second stage ----


def save_run(run: Run, extra: dict[str, str | bytes] | None = None) -> None:
    """Write OUT/step-STEP, whole or not at all, and then remove old ones. All processes call it."""
    tensors = {
        "model.safetensors": run.trained,
        "latents.safetensors": {"bound": run.codec.bound} if run.vae else run.codec.tensors(),
        "optimizer.safetensors": optimizer_tensors(run.trained, run.optimizers),
    }
    if run.ema is not None:
        tensors["ema.safetensors"] = run.ema
    info = {
        "format": FORMAT,
        "step": run.step,
        "name": run.name,
        "base": address(run.base),
        "fingerprint": run.fingerprint,
        "tokenizer": run.tokenizer_identity,
        "vae": run.vae,
        "model": run.overrides,
        "diffusion": {"shift": run.config.schedule_shift, "prediction": run.config.prediction},
        "ema": run.ema is not None,
        "trained": sorted(run.trained),
        "optimizer": sorted(tensors["optimizer.safetensors"]),
        "sources": {flag: sha256(content).hexdigest() for flag, content in run.sources.items()},
        "config": dataclasses.asdict(run.config),
    }
    write_folder(run.out / f"step-{run.step:06d}", tensors, info, "checkpoint.json", extra, run.team)
    if not run.team.is_main:
        return
    for old in list_checkpoints(run.out)[: -run.config.keep]:
        os.rename(old, old.with_name(f".{old.name}.tmp"))  # whole or gone, whatever happens now
    for left in run.out.glob(".*.tmp"):  # by that, or by a kill
        if re.match(r"\.step-|\.(sheet|curves|metrics)", left.name):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
    if run.name in LAST_RUNS:
        LAST_RUNS[run.name].parent.mkdir(parents=True, exist_ok=True)
        write_atomic(LAST_RUNS[run.name], f"{run.out}\n")


def check_tokenizer(folder: Path, info: dict, base: str, ours: str) -> None:
    """ValueError unless a base reads text as a checkpoint's own did; the first ones did not record it."""
    if info.get("tokenizer", ours) != ours:
        raise ValueError(f"the tokenizer.json of {base} is not the one that {folder} was trained with")


def fill_run(run: Run, folder: Path, info: dict, weights: str) -> None:
    """The trained tensors and the codec of a checkpoint, in place of the run's own."""
    if info.get("fingerprint") != run.fingerprint:
        raise ValueError(f"{run.base} is not the language model that {folder} was trained on")
    check_tokenizer(folder, info, run.base, run.tokenizer_identity)
    ours, theirs = ((x or {}).get("fingerprint") for x in (run.vae, info.get("vae")))
    if ours != theirs:
        latents = f"the latents of --data {run.config.data}"
        raise ValueError(f"{latents} are not by the VAE that {folder} was trained with")
    tensors = read_tensors(folder / weights, run.trained)
    for name, p in run.trained.items():
        fill(p, tensors[name])
    run.codec = load_codec(folder, info, run.codec.channels, run.config.vae, run.team.device)


def start_from(run: Run, folder: Path) -> None:
    """Begin a second stage: the image side of a checkpoint (its moving average, if it has one)."""
    info = read_info(folder)
    fill_run(run, folder, info, "ema.safetensors" if info.get("ema") else "model.safetensors")
    if run.ema is not None:
        run.ema = {n: p.detach().clone() for n, p in run.trained.items()}


def resume(run: Run, folder: Path) -> None:
    """Go on from a checkpoint, exactly."""
    info = read_info(folder)
    for name, kind in {"step": int, "optimizer": list}.items():
        if not isinstance(info.get(name), kind):
            raise ValueError(f"{folder / 'checkpoint.json'}: {name} is missing or no {kind.__name__}")
    ema = read_tensors(folder / "ema.safetensors", run.trained) if run.ema is not None else {}
    fill_run(run, folder, info, "model.safetensors")
    for name, value in ema.items():
        fill(run.ema[name], value)
    restore_optimizers(folder / "optimizer.safetensors", info["optimizer"], run.trained, run.optimizers)
    run.step = info["step"]
    # lines of steps that a kill took with it go
    kept = [m for m in read_metrics(run.out / "metrics.jsonl") if m["step"] <= run.step]
    if run.team.is_main:
        write_atomic(run.out / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in kept))
    run.seconds = kept[-1]["seconds"] if kept else 0.0
    if run.team.is_main and (changed := changes(run, info)):
        print(f"{folder} goes on otherwise: {', '.join(changed)}", flush=True)


def changes(run: Run, info: dict) -> list[str]:
    """What a resumed run does otherwise than the checkpoint.json that it comes from."""
    now, was = run.config, TrainConfig(**restore_config(info["config"], run.out))
    names = [f.name for f in dataclasses.fields(now) if getattr(now, f.name) != getattr(was, f.name)]
    found = [f"{flag_name(n)} {getattr(now, n)} (was {getattr(was, n)})" for n in names if n != "out"]
    rates = [c.lr * lr_factor(run.step, c) for c in (now, was)]
    if abs(rates[0] - rates[1]) > 1e-3 * rates[1]:
        found.append(f"learning rate {rates[0]:.3g} (was {rates[1]:.3g})")
    for flag, content in run.sources.items():
        if info.get("sources", {}).get(flag, ours := sha256(content).hexdigest()) != ours:
            found.append(f"{flag} holds something else, of which other parts train and validate")
    return found


def optimizer_tensors(parameters: dict, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state by parameter: {"exp_avg/unet_up.conv_out.bias": ...}."""
    names = {p: n for n, p in parameters.items()}
    states = [(names[p], state) for o in optimizers for p, state in o.state.items()]
    return {f"{key}/{name}": value for name, state in states for key, value in state.items()}


def restore_optimizers(file: Path, names: list[str], parameters: dict, optimizers: list) -> None:
    """Put back what `optimizer_tensors` gave; `file` must hold exactly `names`, or ValueError names one."""
    owner = {p: o for o in optimizers for g in o.param_groups for p in g["params"]}
    expected = {}
    for name in names:
        key, _, parameter = name.partition("/")
        p = parameters.get(parameter)
        if p not in owner:
            raise ValueError(f"{file}: tensor {name} belongs to no trained parameter")
        expected[name] = torch.empty((), device="meta") if key == "step" else p
    for name, value in read_tensors(file, expected).items():
        key, _, parameter = name.partition("/")
        p = parameters[parameter]
        owner[p].state[p][key] = alike(p, value).clone()  # of a fused optimizer, the step as well


def append_metrics(out: Path, line: dict) -> None:
    """A line at the end of OUT/metrics.jsonl; OSError with its name if that cannot be done."""
    path = out / "metrics.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror}") from None


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, up to one that a kill, or whatever it was, has damaged."""
    lines = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            break
        lines.append(row)
    return lines
