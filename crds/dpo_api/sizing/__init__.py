"""What a run takes of its GPUs, and the choice of the layout that fits them.

``products`` is the table of GPUs; ``memory`` predicts bytes and ``speed`` seconds; ``flops`` counts what a step
computes; ``choice`` chooses the sizes that a spec leaves out. Nothing here needs torch or a GPU: the same functions run
in `dpo validate` and in a pod.
"""

from dpo_api.sizing.choice import (
    Candidate,
    Choice,
    Refusal,
    candidates,
    choose,
    hardware_named,
    hardware_of,
    memory_limit,
    without_sizes,
)
from dpo_api.sizing.flops import Work, seen_keys, step_flops, utilization
from dpo_api.sizing.layout import SIZES, Layout, layout_of, set_sizes, with_layout
from dpo_api.sizing.memory import (
    Memory,
    checkpoint_bytes,
    comparison_bytes,
    cut_layers,
    memory_of,
    memory_of_stage,
)
from dpo_api.sizing.parameters import Stage, parameters, stages
from dpo_api.sizing.products import PRODUCTS, Product, product_named, product_of
from dpo_api.sizing.speed import Hardware, step_seconds

__all__ = [
    "PRODUCTS",
    "SIZES",
    "Candidate",
    "Choice",
    "Hardware",
    "Layout",
    "Memory",
    "Product",
    "Refusal",
    "Stage",
    "Work",
    "candidates",
    "checkpoint_bytes",
    "choose",
    "comparison_bytes",
    "cut_layers",
    "hardware_named",
    "hardware_of",
    "layout_of",
    "memory_limit",
    "memory_of",
    "memory_of_stage",
    "parameters",
    "product_named",
    "product_of",
    "seen_keys",
    "set_sizes",
    "stages",
    "step_flops",
    "step_seconds",
    "utilization",
    "with_layout",
    "without_sizes",
]
