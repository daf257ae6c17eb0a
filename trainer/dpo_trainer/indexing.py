"""`python -m dpo_trainer index`: read and check all data as a run does, without model weights or a GPU."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_api.errors import DPOError
from dpo_api.manifest import load_manifest
from dpo_api.models import read_config
from dpo_api.plan import make_plan
from dpo_api.progress import LastWords
from dpo_trainer.data.index.build import Listener, blend_of, build_indexes
from dpo_trainer.sources import model_source, open_tokenizer, store_for


def print_index(spec_path: Path) -> int:
    """Print the summary as one JSON object, or the termination message that says why not. Returns the exit code."""
    try:
        print(json.dumps(index_report(spec_path), allow_nan=False))
    except DPOError as error:
        print(LastWords(outcome=error.outcome.name, message=str(error)).to_json())
        return error.exit_code
    return 0


def index_report(spec_path: Path) -> dict[str, Any]:
    """Return ``train`` and ``validation`` (by name): the statistics of data.tally; ``plan``: the derived values.

    Each training source has ``uses`` too: how many of its pairs an epoch uses.
    """
    spec = load_manifest(spec_path).spec
    store, folder = model_source(spec)
    indexes = build_indexes(
        spec,
        open_tokenizer(spec),
        lambda source: store_for(spec, source.storage),
        vocabulary=read_config(store, folder).vocab_size,
        listener=Listener(message=lambda text: print(text, file=sys.stderr)),
    )
    uses = blend_of(spec.data, indexes.train).uses
    sources = [{**source, "uses": used} for source, used in zip(indexes.train.stats["sources"], uses, strict=True)]
    plan = asdict(make_plan(spec, indexes.train.n, [index.n for index in indexes.validation.values()]))
    plan["warnings"] = [f"{finding['field']}: {finding['message']}" for finding in plan["warnings"]]
    return {
        "train": {**indexes.train.stats, "sources": sources},
        "validation": {name: index.stats for name, index in indexes.validation.items()},
        "plan": plan,
    }
