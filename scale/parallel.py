"""One run on many processes: PyTorch's FSDP2 under `torchrun`.

    torchrun --nproc-per-node 8 train.py --config qwen3-8b --data latents/train

Every process holds a slice of every parameter, gradient and optimizer state, and gathers a layer whole just
before it computes it. It reads its own share of the global batch; what is drawn for a batch does not depend
on how many share it. bfloat16 means: computed in bfloat16, while the weights that learn stay float32; this is
the same machinery, with one process or many.
"""

import hashlib
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# FSDP and its tensors take half a second to import: in the functions that need them


@dataclass(frozen=True)
class Team:
    """The processes of a run; by default one that is alone and needs none of this."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"  # of this process
    mesh: DeviceMesh | None = None  # None: alone, in float32

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This process's part of n samples; n is a multiple of `size`."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """Sums over the processes, in one go; on the device where there are several, and not waited for."""
        if self.size == 1:
            return vectors
        x = torch.cat([v.to(self.device, non_blocking=True) for v in vectors])
        dist.all_reduce(x)
        return x.split([len(v) for v in vectors])

    def total(self, values: list[float]) -> list[float]:
        """Sums over the processes."""
        return self.sum(torch.tensor(values, dtype=torch.float64))[0].tolist()

    def main_first(self, work: Callable[[], Any]) -> Any:
        """What work() gives, in each process; the others begin when the main one has left its files."""
        result = work() if self.is_main else None
        self.wait()
        result = result if self.is_main else work()
        self.wait()
        return result

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, what: str, content: bytes) -> None:
        """ValueError, in every process, unless all hold the same content."""
        mine, everyone = hashlib.sha256(content).hexdigest()[:12], [""] * self.size
        if self.size > 1:
            dist.all_gather_object(everyone, mine)
            for rank, other in enumerate(everyone):
                if other != everyone[0]:
                    found = f"rank 0 has {everyone[0]}, rank {rank} has {other} (fingerprints)"
                    raise ValueError(f"the processes differ in {what}: {found}; every one must read the same")


def own_device(device: str) -> str:
    """Under torchrun each process has a GPU of its own, whichever was named."""
    cuda = device.partition(":")[0] == "cuda"
    return f"cuda:{os.environ['LOCAL_RANK']}" if cuda and "LOCAL_RANK" in os.environ else device


def init_processes(device: str, dtype: str) -> Team:
    """The team of torchrun's environment; a process alone needs the machinery for bfloat16 only."""
    launched = "WORLD_SIZE" in os.environ and "RANK" in os.environ
    if not launched and dtype == "float32":
        return Team(device=device)
    device = own_device(device)
    kind = torch.device(device).type
    backend = "nccl" if kind == "cuda" else "gloo"
    if kind == "cuda":
        torch.cuda.set_device(torch.device(device).index or 0)
    if launched:  # long patience: the first process may download a base while the others wait
        dist.init_process_group(backend, timeout=timedelta(hours=3))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    size = dist.get_world_size()
    return Team(dist.get_rank(), size, device, init_device_mesh(kind, (size,)))


def end_processes(team: Team) -> None:
    """The end of a run, or of a process that failed."""
    if team.mesh is not None and dist.is_initialized():
        dist.destroy_process_group()


def peer_lost(error: RuntimeError) -> bool:
    """Whether torch's back ends say that another process is; not whatever else they have to say."""
    said = "(?i)by peer|broken pipe|connection|socket|time(d )?out|ncclRemoteError"
    return re.search(said, str(error)) is not None


def shard(model: nn.Module, team: Team, dtype: torch.dtype) -> None:
    """Cut a model (on any device, meta too) among the processes: each layer, each U-Net half, the rest."""
    if team.mesh is None:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    computed = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(computed, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*model.layers, model.unet_down, model.unet_up):  # one process alone has nothing to give back
        fully_shard(part, mesh=team.mesh, mp_policy=policy, reshard_after_forward=team.size > 1)
    # Embeddings, head and final norms stay whole from `encode` to the end of the backward pass: a process
    # without text to learn calls no head, and must not miss a gathering that the others wait for.
    fully_shard(model, mesh=team.mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "encode")
    # keys and values are views of one product; nothing here changes them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def release(model: nn.Module) -> None:
    """After a forward pass without a backward one: give up what `shard` says stays whole until then."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def full_tensor(p: Tensor) -> Tensor:
    """A parameter, gradient or state of which each process may hold a slice, whole. All must call it."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def alike(p: Tensor, value: Tensor, device: str | torch.device | None = None) -> Tensor:
    """A whole tensor, cut the way p is; on the device of p, or on another."""
    value = value.to(device or p.device)
    if not hasattr(p, "full_tensor") or value.shape != p.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # a copy: the slice alone would keep the whole tensor in memory
    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None).clone()


@torch.no_grad()
def fill(p: Tensor, value: Tensor) -> None:
    """Write a whole tensor into a parameter: into this process's slice of it, where there are several."""
    p.copy_(alike(p, value))
