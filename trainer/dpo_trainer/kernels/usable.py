"""Whether Triton's kernels run on a device: the library, a C compiler for its launchers, and a GPU are needed."""

import logging
from functools import cache

import torch

log = logging.getLogger(__name__)

WRONG_SUM = "a sum that they compute is wrong"


@cache
def why_not(device: torch.device) -> str | None:
    """Return why the kernels do not run there, or None if they do. A small one is run to find out, once a process."""
    if device.type != "cuda":
        return "there is no GPU"
    try:
        from dpo_trainer.kernels import head

        logits = torch.zeros(2, head.BLOCK + 8, device=device)[:, : head.BLOCK + 1]
        _, mass, _ = head.statistics(logits, torch.zeros(2, dtype=torch.int64, device=device))
        right = bool((mass == head.BLOCK + 1).all())
    except Exception as error:  # noqa: BLE001 - compilers and drivers fail in ways of their own
        return " ".join(str(error).split())[:300] or type(error).__name__
    return None if right else WRONG_SUM


@cache
def usable(device: torch.device) -> bool:
    """Whether the kernels run there. Where a GPU is and they do not, says so in the log, once."""
    reason = why_not(device)
    if reason is not None and device.type == "cuda":
        log.warning("Triton's kernels are not used, so a step is slower: %s", reason)
    return reason is None


def computes(x: torch.Tensor) -> bool:
    """Whether the kernels compute with tensors like this one: they do in fp32 on GPUs, not in float64."""
    return x.dtype != torch.float64 and usable(x.device)
