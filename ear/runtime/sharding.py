"""Weights in shards, one per rank (torch's FSDP2), for models beyond the memory of one GPU.

Each rank stores 1/world_size of every weight, gradient, moment and EMA, and gathers a part of the network only while
that part computes. Checkpoints hold whole tensors, so a sharded training resumes with any world size, sharded or not.
Every function here also takes unsharded tensors, and then needs no communication.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ear.runtime import distributed


def shard(module: nn.Module, parts: Iterable[nn.Module], *, method: str, device: torch.device) -> None:
    """Divide the weights of `module` among all ranks, in place; all ranks must call it together.

    The module may be in host memory: `device` gets one part after the other, and keeps only its shards. Gradients
    become sums over ranks. parts: submodules that are gathered one after the other, in order of their use; the rest is
    gathered as a whole. method: the one of `module` that computes with all of it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (distributed.size(),))
    for part in (*parts, module):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(module, method)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is a shard."""
    # Checks an attribute: checking the class would import DTensor even in runs without shards.
    return any(hasattr(tensor, "full_tensor") for tensor in tensors)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of a shard, on every rank; all ranks must call it together."""
    return tensor.full_tensor() if is_sharded([tensor]) else tensor  # type: ignore[attr-defined]


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, divided as `like` is, on its device and as a copy."""
    tensor = tensor.to(like.device, copy=True)
    if not is_sharded([like]):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of whole tensors in rank 0's host memory; {} on other ranks. All ranks must call it together.

    Shards are gathered one tensor at a time, so no device needs memory for all of them.
    """
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor.detach())
        if distributed.is_main():
            copies[name] = gathered.to("cpu", copy=True)
    return copies
