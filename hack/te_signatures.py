"""Writes the signatures of Transformer Engine that the trainer depends on to tests/golden/transformer-engine/.

    pip download --no-deps transformer-engine==VERSION
    python hack/te_signatures.py transformer_engine-VERSION-py3-none-any.whl

The wheel has the library's Python sources. They are parsed, not imported: importing them needs a GPU's libraries. A
file holds names of parameters and their kinds, and no other part of the sources. dpo_testing.transformer_engine reads
them.
"""

import ast
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "transformer-engine"

FUNCTIONS = {
    "transformer_engine/pytorch/module/linear.py": ("Linear.__init__", "Linear.forward"),
    "transformer_engine/pytorch/optimizers/fused_adam.py": ("FusedAdam.__init__",),
    "transformer_engine/pytorch/optimizers/multi_tensor_apply.py": ("MultiTensorApply.__call__",),
    "transformer_engine/pytorch/quantization.py": ("fp8_autocast", "fp8_model_init"),
    "transformer_engine/pytorch/distributed.py": ("checkpoint", "activation_recompute_forward.__init__"),
    "transformer_engine/common/recipe/__init__.py": ("Float8CurrentScaling",),
}
"""File of the wheel → its functions, methods, and dataclasses (of which the fields are the parameters)."""

ATTRIBUTES = ("fuse_wgrad_accumulation", "save_original_input")
"""What the trainer sets on a linear layer once its gradient buffer exists, and what Megatron-Core sets for FP8."""


def main(wheels: list[str]) -> int:
    """Write one file for each wheel."""
    for wheel in wheels:
        found = re.fullmatch(r"transformer_engine-([0-9.]+)-.*\.whl", Path(wheel).name)
        if found is None:
            print(f"{wheel} is not named like a wheel of transformer_engine", file=sys.stderr)
            return 1
        signatures: dict[str, dict[str, list[str]]] = {}
        with zipfile.ZipFile(wheel) as archive:
            for file, names in FUNCTIONS.items():
                tree = ast.parse(archive.read(file))
                module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                signatures |= {f"{module}.{name}": parameters(tree, name) for name in names}
                unread = [name for name in ATTRIBUTES if "Linear.__init__" in names and not reads(tree, name)]
                if unread:
                    print(f"{wheel}: Linear does not read its {unread}", file=sys.stderr)
                    return 1
        GOLDEN.mkdir(parents=True, exist_ok=True)
        (GOLDEN / f"{found[1]}.json").write_text(json.dumps(signatures, indent=1) + "\n")
    return 0


def reads(tree: ast.Module, attribute: str) -> bool:
    """Whether ``Linear`` reads this attribute of itself."""
    found = (node for node in ast.walk(definition(tree, "Linear")) if isinstance(getattr(node, "ctx", None), ast.Load))
    found = (node for node in found if isinstance(node, ast.Attribute) and node.attr == attribute)
    return any(isinstance(node.value, ast.Name) and node.value.id == "self" for node in found)


def definition(tree: ast.Module, name: str) -> ast.ClassDef | ast.FunctionDef:
    """Return the definition of ``function``, ``Class`` or ``Class.method``."""
    node: Any = tree
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        (node,) = (child for child in node.body if isinstance(child, kinds) and child.name == part)
    found: ast.ClassDef | ast.FunctionDef = node
    return found


def parameters(tree: ast.Module, name: str) -> dict[str, list[str]]:
    """Return a function's parameters by kind, ``self`` left out: required, optional, keywords, and the others."""
    node = definition(tree, name)
    if isinstance(node, ast.ClassDef):
        fields = [x for x in node.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)]
        named = {bare: [ast.unparse(x.target) for x in fields if (x.value is None) is bare] for bare in (True, False)}
        return {"required": named[True], "optional": named[False], "keywords": [], "others": []}
    words = node.args
    plain = [word.arg for word in (*words.posonlyargs, *words.args) if word.arg != "self"]
    count = len(plain) - len(words.defaults)
    return {
        "required": plain[:count],
        "optional": plain[count:],
        "keywords": [word.arg for word in words.kwonlyargs],
        "others": [
            f"{stars}{word.arg}" for stars, word in (("*", words.vararg), ("**", words.kwarg)) if word is not None
        ],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
