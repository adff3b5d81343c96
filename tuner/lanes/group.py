"""The process group of a lane's workers, which talk on the address of their node alone."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, TypeVar

from tuner.loopback import interface_of, is_loopback

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class LaneGroup:
    """One worker's part in the group: what rank 0 decides reaches every rank. A lane of one worker needs no group.

    Args:
        rank: of this worker; rank 0 says where they meet.
        world: workers of the lane.
    """

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world = rank, world
        if world > 1:
            _join(rank, world, device)

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[T] = [value] * self.world
        dist.all_gather_object(values, value)
        return values


def _join(rank: int, world: int, device: torch.device) -> None:
    import torch.distributed as dist
    from ray.train.collective import broadcast_from_rank_zero
    from ray.util import get_node_ip_address

    here: str = get_node_ip_address()  # type: ignore[no-untyped-call]
    # A store that binds for itself listens on all interfaces.
    listener = _listen(here) if rank == 0 else None
    backend = "nccl" if device.type == "cuda" else "gloo"
    meeting = (*listener.getsockname()[:2], backend) if listener else None
    address, port, backend = broadcast_from_rank_zero(meeting)
    if is_loopback(address):
        # Both would take the interface of the machine's name, which other machines can reach.
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, interface_of(address) or "lo")
    # The socket is the store's from here on.
    descriptor = listener.detach() if listener else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, world, is_master=rank == 0, master_listen_fd=descriptor
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def _listen(address: str) -> socket.socket:
    return socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
