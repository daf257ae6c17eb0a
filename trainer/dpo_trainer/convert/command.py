"""`python -m dpo_trainer convert`: writes a model in another format, and compares what was written with the source."""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dpo_api.errors import DPOError, InvalidModelError, NotFoundError, UsageError
from dpo_api.inputs import Model
from dpo_api.models import read_config
from dpo_api.models.adapter import read_adapter
from dpo_api.models.folder import Files
from dpo_api.models.megatron.checkpoint import LATEST
from dpo_api.models.megatron.distributed import TABLE
from dpo_api.models.megatron.outgoing import describe
from dpo_api.models.megatron.settings import CONFIG
from dpo_api.models.start import start_model
from dpo_store import StorageOptions, Store, base_name, open_store
from dpo_trainer.convert import huggingface, megatron, nemo
from dpo_trainer.convert.compare import compare
from dpo_trainer.convert.forward import TOKENS
from dpo_trainer.convert.journal import Journal
from dpo_trainer.convert.progress import Progress
from dpo_trainer.convert.whole import Whole
from dpo_trainer.formats.adapter import AdapterMatrices
from dpo_trainer.formats.export import MAX_SHARD_BYTES, OUTPUT_DTYPES

FORMATS = ("huggingface", "megatron", "nemo")


def main(words: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dpo_trainer convert", description="Write a model in another format."
    )
    parser.add_argument("source", help="the model: a folder (Hugging Face, NeMo, Megatron-Core) or a .nemo file")
    parser.add_argument("--adapter", help="a folder with a LoRA adapter of the model (PEFT): it is merged into it")
    parser.add_argument("target", help="what to write: a folder, or for nemo a file; s3:// too")
    parser.add_argument(
        "--to", choices=FORMATS, help="the target's format (default: nemo for *.nemo, else huggingface)"
    )
    parser.add_argument(
        "--dtype", choices=list(OUTPUT_DTYPES), help="type of the written weights (default: the source's)"
    )
    parser.add_argument("--no-check", action="store_true", help="do not read the result again to compare it")
    parser.add_argument("--endpoint", help="the S3 server (default: boto3's usual sources)")
    parser.add_argument("--region", help="the S3 region")
    parser.add_argument("--max-shard-bytes", type=int, default=MAX_SHARD_BYTES, help=argparse.SUPPRESS)
    try:
        print(run(parser.parse_args(words)))
    except DPOError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def run(arguments: argparse.Namespace) -> str:
    """Convert; return what was done in a sentence. Raises DPOError."""
    store = open_store(StorageOptions(endpoint=arguments.endpoint, region=arguments.region))
    target: str = arguments.target.rstrip("/")
    form = arguments.to or ("nemo" if target.endswith(".nemo") else "huggingface")
    if (form == "nemo") is not target.endswith(".nemo"):
        raise UsageError(f"{target}: a target in the format nemo, and no other, ends with .nemo")
    source = open_model(store, arguments.source, OUTPUT_DTYPES.get(arguments.dtype or ""), arguments.adapter)
    named = source.uri + (f" with {arguments.adapter}" if arguments.adapter else "")
    identity = _identity(store, source, form, arguments)
    with _written(form, source, store, target, arguments.max_shard_bytes, identity):
        if not arguments.no_check:
            compare(source, open_model(store, target), log_probs=True)
    if arguments.no_check:
        return f"{target}: written, and not compared with {named}"
    equal = f"all {len(source.slots)} parameters and the log-probs of {TOKENS - 1} tokens"
    return f"{target}: {equal} are equal to those of {named}"


def write_as(form: str, source: Whole, store: Store, target: str) -> None:
    """Write a model in a format of ``FORMATS``, and compare its parameters with the source's. Raises DPOError.

    Log-probs are not compared: they need a process whose model is not divided.
    """
    with _written(form, source, store, target, MAX_SHARD_BYTES, {"source": source.uri, "format": form}):
        compare(source, open_model(store, target), log_probs=False)


@contextmanager
def _written(
    form: str, source: Whole, store: Store, target: str, max_shard_bytes: int, identity: dict[str, Any]
) -> Iterator[None]:
    """Write a model, and note after the context that all is right with it.

    identity: what must be the same for a stopped conversion to continue.
    """
    if form == "nemo" and store.exists(target):
        raise UsageError(f"{target} exists; choose another target")
    if form != "huggingface":
        describe(source.config, form, source.uri)
    folder = target + nemo.PARTS if form == "nemo" else target
    journal = Journal(store, folder, identity)
    with Progress(huggingface.bytes_of(source), f"Converting to {form}") as progress:
        if form == "nemo":
            nemo.write(source, store, target, journal, progress)
        elif form == "megatron":
            megatron.write(source, store, target, journal, progress)
        else:
            huggingface.write(source, store, target, journal, progress, max_shard_bytes)
    yield
    if form != "nemo":  # whose parts, the journal among them, are deleted
        journal.close()


def open_model(store: Store, uri: str, dtype: torch.dtype | None = None, adapter: str | None = None) -> Whole:
    """Open a model of any format that can be read. Raises NotFoundError or InvalidModelError.

    dtype: to write it in; adapter: the folder of one, which is added to its weights.
    """
    files, folder = start_model(store, model_of(store, uri))
    config = read_config(files, folder)
    matrices = None if adapter is None else AdapterMatrices(store, read_adapter(store, adapter, config))
    return Whole.open(files, folder, config, dtype, matrices)


def model_of(store: Files, uri: str) -> Model:
    """Return the start model that an address names; its format follows from its name and its files."""
    address = uri.rstrip("/")
    names: list[str] = [] if address.endswith(".nemo") else list(store.children(address))
    if address.endswith(".nemo") or CONFIG in names:
        return Model.model_validate({"nemo": {"uri": address}})
    if "config.json" in names:
        return Model.model_validate({"huggingFace": {"uri": address}})
    if LATEST in names or TABLE in names:
        return Model.model_validate({"megatron": {"uri": address}})
    if not names:
        raise NotFoundError(f"{uri} does not exist, or is an empty folder")
    raise InvalidModelError(
        f"{uri} is no model: it has neither config.json (Hugging Face) nor {CONFIG} (NeMo) nor {LATEST}"
        f" or {TABLE} (Megatron-Core)"
    )


def _identity(store: Store, source: Whole, form: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what must be the same for a stopped conversion to continue."""
    address = arguments.source.rstrip("/")
    found = {
        "source": base_name(address),
        "format": form,
        "dtype": arguments.dtype,
        "shard": arguments.max_shard_bytes,
        "files": _files(store, address),
        "model": source.config.fingerprint,
    }
    return found | ({"adapter": _files(store, arguments.adapter)} if arguments.adapter else {})


def _files(store: Store, address: str) -> list[list[Any]]:
    """Return the name, the size and the ETag of a file, or of each file of a folder."""
    objects = [store.stat(address)] if store.exists(address) else list(store.list(address))
    return [[base_name(info.uri), info.size, info.etag] for info in objects]
