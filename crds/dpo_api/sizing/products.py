"""The GPU products whose memory and speed are known, and how a job says which one it runs on.

A product is known from ``spec.resources.gpuProduct``, else from a node selector with a well-known label. The names that
the driver gives (``NVIDIA H100 80GB HBM3``), and those of the labels, are found by the words in them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dpo_api.spec import DPOJobSpec

GIB = 2**30


@dataclass(frozen=True)
class Product:
    """What the choice of a layout needs to know of a GPU."""

    name: str
    memory: int
    """Bytes that CUDA reports, rounded down to a whole GiB."""
    tflops: float
    """Dense bf16 TFLOP/s of the data sheet."""
    nvlink: float
    """GB/s that a GPU sends to the others of its node: one direction of NVLink, or PCIe where there is none."""
    network: float
    """GB/s that a GPU's share of the network sends to other nodes, in the usual machine with this GPU."""
    words: tuple[str, ...]
    """What a driver's or a label's name of the product contains, in lower case without punctuation."""
    fp8: bool = True
    """Whether it multiplies FP8 matrices: those of compute capability 8.9 and later do."""


PRODUCTS: tuple[Product, ...] = (
    Product("B200", 178 * GIB, 2250, 900, 50, ("b200",)),
    Product("H200", 139 * GIB, 989, 450, 50, ("h200",)),
    Product("H100-NVL", 93 * GIB, 835, 300, 50, ("h100", "nvl")),
    Product("H100-80GB", 79 * GIB, 989, 450, 50, ("h100",)),
    Product("A100-80GB", 79 * GIB, 312, 300, 25, ("a100", "80gb"), fp8=False),
    Product("A100-40GB", 39 * GIB, 312, 300, 12.5, ("a100",), fp8=False),
    Product("L40S", 44 * GIB, 362, 32, 12.5, ("l40s",)),
    Product("L4", 21 * GIB, 121, 32, 3, ("l4",)),
    Product("A10G", 21 * GIB, 70, 32, 3, ("a10g",), fp8=False),
)
"""The products, those with more words before those whose words they hold."""

SELECTORS = (
    "nvidia.com/gpu.product",  # NVIDIA's GPU feature discovery
    "cloud.google.com/gke-accelerator",
    "karpenter.k8s.aws/instance-gpu-name",
    "eks.amazonaws.com/instance-gpu-name",
)
"""Labels of nodes whose value names the GPU."""


def product_named(text: str) -> Product | None:
    """Return the product that a driver's or a label's text names; None if the table has none.

    ``NVIDIA-H100-80GB-HBM3``, ``nvidia-h100-80gb``, ``h100`` and ``NVIDIA H100 80GB HBM3`` are the H100-80GB. A part of
    a GPU (MIG) is none of them: its memory is its own.
    """
    words = re.findall(r"[a-z0-9]+", text.lower())
    if "mig" in words:
        return None
    return next((product for product in PRODUCTS if all(word in words for word in product.words)), None)


def product_of(spec: DPOJobSpec) -> Product | None:
    """Return the product that a spec asks for: its own field, else a well-known node selector; None if neither does."""
    if spec.resources.gpu_product is not None:
        return product_named(spec.resources.gpu_product)
    selector = spec.pod_template.node_selector
    named = (product_named(selector[label]) for label in SELECTORS if label in selector)
    return next((product for product in named if product is not None), None)


def assumed() -> Product:
    """Return the product that a prediction assumes where none is known: nothing is refused because of it."""
    return next(product for product in PRODUCTS if product.name == "H100-80GB")
