"""The rendezvous of a run on one node: the processes of its torchrun find each other through the loopback address.

torchrun's own choice for one node is its dynamic rendezvous, whose store listens on all addresses, and which unpickles
the state that it finds there. This one and the static rendezvous of several nodes unpickle nothing.
"""

import socket
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

_ADDRESS = "127.0.0.1"
_SECONDS = 600


class LocalRendezvous(RendezvousHandler):
    """A rendezvous whose only node is this one. The training processes use its store, too."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        """Listen on a free port."""
        self._parameters = parameters
        # The store takes over the socket. If it opened one itself, it would listen on all addresses.
        listener = socket.create_server((_ADDRESS, 0))
        self._place = RendezvousStoreInfo(_ADDRESS, listener.getsockname()[1])
        self._store = TCPStore(
            _ADDRESS,
            self._place.master_port,
            world_size=1,
            is_master=True,
            timeout=timedelta(seconds=_SECONDS),
            master_listen_fd=listener.detach(),
        )

    @property
    def use_agent_store(self) -> bool:
        """True: the training processes use this store instead of one of rank 0."""
        return True

    def get_backend(self) -> str:
        """Return the name under which torchrun knows this rendezvous."""
        return str(self._parameters.backend)

    def get_run_id(self) -> str:
        """Return the prefix of torchrun's own keys in the store."""
        return str(self._parameters.run_id)

    def next_rendezvous(self) -> RendezvousInfo:
        """Return at once: there is no other node to wait for."""
        return RendezvousInfo(PrefixStore(self.get_run_id(), self._store), 0, 1, self._place)

    def is_closed(self) -> bool:
        """Return False: torchrun asks whether another node has closed it."""
        return False

    def set_closed(self) -> None:
        """Do nothing: no other node could notice."""

    def num_nodes_waiting(self) -> int:
        """Return 0: no other node can join."""
        return 0

    def shutdown(self) -> bool:
        """Return True: the store is closed when this process ends."""
        return True
