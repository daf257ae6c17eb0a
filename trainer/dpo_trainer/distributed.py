"""The process group of a run: its members, and the few things that all ranks decide together."""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.api import CheckpointException

from dpo_api.errors import InvalidSpecError
from dpo_trainer import bridge, messages, peers
from dpo_trainer.waiting import LONGEST_WAIT_SECONDS, Place

_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL error", "Broken pipe")
"""Texts of the plain RuntimeErrors that Gloo and NCCL raise when another process has exited."""


def lost_contact(error: BaseException) -> bool:
    """Whether the error means that another process of the run exited, and not that this one failed."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError | CheckpointException) and any(text in str(error) for text in _LOST_PEER)


def check_device(local_rank: int, gpus: int) -> None:
    """Raise InvalidSpecError if a process would have no GPU of its own: NCCL cannot share one."""
    if local_rank >= gpus:
        raise InvalidSpecError(
            f"process {local_rank} of this node (counted from 0) has no GPU: there {'is' if gpus == 1 else 'are'} "
            f"{gpus}; start {gpus} with resources.processesPerNode (dpo run: --processes)"
        )


@dataclass(frozen=True)
class World:
    """This process's place among the run's processes, from the environment that torchrun sets."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    place: Place = field(default_factory=Place, compare=False)
    """Where this process is in the run, for the others if they wait for it."""

    @classmethod
    def join(
        cls,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        context: int = 1,
        seed: int = 1234,
        timeout_seconds: int = LONGEST_WAIT_SECONDS,
    ) -> Self:
        """Join the run's process group and divide it; see ``connect`` and ``divide``."""
        world = cls.connect(timeout_seconds=timeout_seconds)
        world.divide(tensor=tensor, pipeline=pipeline, context=context, seed=seed, timeout_seconds=timeout_seconds)
        return world

    @classmethod
    def connect(cls, *, timeout_seconds: int = LONGEST_WAIT_SECONDS) -> Self:
        """Join the run's process group: NCCL where a GPU is present, else Gloo.

        Until ``divide``, only what all ranks do together works: ``broadcast``, ``from_main``, ``any``, ``barrier``.

        timeout_seconds: of each collective. ``waiting.Watch`` ends a run in which a rank waits too long for a step.
        Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without them this is a run of one process.
        """
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        rank, size, local_rank = (int(os.environ.get(name, value)) for name, value in alone.items())
        gpu = torch.cuda.is_available()
        if gpu:
            check_device(local_rank, torch.cuda.device_count())
            torch.cuda.set_device(local_rank)
            # NVIDIA's images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, with which fp32 products are rounded to 11 bits.
            torch.set_float32_matmul_precision("highest")
            # cuDNN's attention makes a plan for each new length, which takes longer than the attention of a pair.
            torch.backends.cuda.enable_cudnn_sdp(enabled=False)
        else:
            bridge.install()
        peers.restrict()
        if not dist.is_initialized():
            timeout = timedelta(seconds=timeout_seconds)
            if size == 1:
                # There are no peers: an in-memory store needs no port and no name resolution.
                dist.init_process_group(
                    "nccl" if gpu else "gloo", store=HashStore(), rank=0, world_size=1, timeout=timeout
                )
            else:
                dist.init_process_group("nccl" if gpu else "gloo", timeout=timeout)
        device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
        return cls(rank=rank, size=size, local_rank=local_rank, device=device)

    def divide(
        self,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        context: int = 1,
        seed: int = 1234,
        timeout_seconds: int = LONGEST_WAIT_SECONDS,
    ) -> None:
        """Make Megatron-Core's groups of these sizes, and seed its random numbers on GPUs.

        timeout_seconds: of each collective of these groups.

        Raises InvalidSpecError if the sizes do not divide the processes.
        """
        model_size = tensor * pipeline * context
        if self.size % model_size:
            raise InvalidSpecError(
                f"spec.parallelism: tensor {tensor} x pipeline {pipeline} x context {context} = {model_size} does not "
                f"divide the {self.size} processes of this run; change one of them"
            )
        gpu = self.device.type == "cuda"
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                context_parallel_size=context,
                create_gloo_process_groups=False,  # Megatron-Core's own checkpoints need them, ours do not
                distributed_timeout_minutes=max(1, timeout_seconds // 60),  # its default is 30
            )
        if gpu:
            model_parallel_cuda_manual_seed(seed)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which does what only one process must do."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """This process's rank among those that train on different pairs."""
        return int(parallel_state.get_data_parallel_rank())

    @property
    def data_size(self) -> int:
        """How many processes train on different pairs."""
        return int(parallel_state.get_data_parallel_world_size())

    @property
    def context_rank(self) -> int:
        """This process's rank among those that share each pack."""
        return int(parallel_state.get_context_parallel_rank())

    @property
    def context_size(self) -> int:
        """How many processes share each pack."""
        return int(parallel_state.get_context_parallel_world_size())

    @property
    def is_first_of_pack(self) -> bool:
        """Whether this rank is the first of those of its pipeline stage that compute the same packs."""
        return parallel_state.get_tensor_model_parallel_rank() == 0 and self.context_rank == 0

    @property
    def owns_numbers(self) -> bool:
        """Whether this rank's sums over its packs count: it is of the last stage, and its first rank of these packs.

        Every pack has one such rank. Other stages compute no loss, and other tensor and context ranks the same one
        again.
        """
        return bool(parallel_state.is_pipeline_last_stage()) and self.is_first_of_pack

    def sum_of_owners(self, values: torch.Tensor) -> torch.Tensor:
        """Sum float64 values of any shape over the ranks that own numbers; the same bits on all ranks of the run.

        A collective of all ranks. What the other ranks pass is not read.
        """
        return self.sum_of_all(values if self.owns_numbers else torch.zeros_like(values))

    def sum_of_all(self, values: torch.Tensor) -> torch.Tensor:
        """Sum float64 values of any shape over all ranks of the run; the same bits on all. A collective."""
        total = values.to(self.device, torch.float64, copy=True)
        self.place.part("sum over all ranks")
        dist.all_reduce(total)
        return total.cpu()

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """Return rank 0's values on every rank; shape and dtype must be equal on all."""
        box = values.to(self.device)
        self.place.part("message of rank 0")
        dist.broadcast(box, src=0)
        return box.cpu()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank. Ranks use this to agree to stop at the same step."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any rank, in one collective."""
        if self.size == 1:  # a GPU would have to finish its work first
            return list(flags)
        values = torch.tensor([float(flag) for flag in flags], device=self.device)
        self.place.part("agreement on a request to stop")
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [bool(value) for value in values.tolist()]

    def from_main[T](self, value: T | None) -> T:
        """Return rank 0's value on every rank. It travels as JSON: it must be of JSON's types, and no tuple.

        Raises InternalError if what arrives cannot come from a rank 0 of this run.
        """
        self.place.part("message of rank 0")
        return messages.from_first(value)

    def to_main[T](self, value: T) -> list[T] | None:
        """Return every rank's value, in the order of ranks, on rank 0, and None on the others. A collective.

        They travel as JSON. Raises InternalError if what arrives cannot come from a rank of this run.
        """
        self.place.part("message to rank 0")
        return messages.to_first(value)

    def barrier(self) -> None:
        """Wait for every rank."""
        self.place.part("barrier")
        if self.device.type == "cuda":
            dist.barrier(device_ids=[self.local_rank])
        else:
            dist.barrier()

    def leave(self) -> None:
        """Destroy the process groups, so that another run can start in this process."""
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
