"""The model card: README.md of the exported folder, with the front matter that the Hugging Face hub reads.

It depends on the spec, the data and the result alone, so the same run writes the same card. It names no file of the
machine but by the addresses of the manifest.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Self

import yaml

from dpo_api.errors import DPOError
from dpo_api.manifest import DPOJob
from dpo_api.models.folder import Files, Objects, file_in, read_json
from dpo_api.spec import DPOJobSpec
from dpo_api.texts import counted, number
from dpo_api.version import VERSION
from dpo_store import join_uri
from dpo_trainer.exporting import Place, forms_of
from dpo_trainer.training import Inputs

CARD = "README.md"
TAG = "dpo-operator"
"""A tag of each card that is written here."""

_CARD_MAX = 1 << 20
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,95}")
_LINK = re.compile(r"https?://[^\s@<>]{1,500}")
_NOT_SHOWN = ("validation_step_time",)
"""Metrics that differ from run to run."""
_LIBRARIES = ("torch", "megatron-core", "transformers")


@dataclass(frozen=True)
class Trained:
    """What a run did, for its card."""

    step: int
    """Step whose weights the model has."""
    last_step: int
    metrics: Mapping[str, float]
    """Metrics when the weights were those of the model, as ``val/loss``."""
    train: Sequence[Mapping[str, Any]]
    """Counts of each training source, in the order of the spec: ``pairs``, ``dropped``."""
    validation: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, inputs: Inputs, last_step: int, step: int, metrics: Mapping[str, float]) -> Self:
        """From the data of a run; ``stats`` has the sources in the order of the spec."""
        held_out = [source for data in inputs.validation for source in data.index.stats["sources"]]
        return cls(step, last_step, metrics, inputs.train.index.stats["sources"], held_out)


def write_cards(job: DPOJob, trained: Trained, source: tuple[Files, str], target: Place) -> None:
    """Write the card of each form of the model into its folder, unless a README.md of somebody else is there.

    source: the start model's folder.
    """
    store, uri = target
    license_ = license_of(*source)
    whole, adapter = forms_of(job.spec)
    folders = ([(uri, False)] if whole else []) + ([(join_uri(uri, "adapter"), True)] if adapter else [])
    for folder, alone in folders:
        tags = _front_matter(store, folder).get("tags")
        if CARD not in store.children(folder + "/") or (isinstance(tags, list) and TAG in tags):
            store.write(join_uri(folder, CARD), model_card(job, trained, license_, adapter=alone).encode())


def _front_matter(files: Objects, folder: str) -> dict[str, Any]:
    """Return the front matter of the folder's card; empty if there is none that can be read."""
    try:
        text = files.read(file_in(folder, CARD), 0, _CARD_MAX).decode("utf-8", "replace")
        found = _FRONT_MATTER.match(text)
        said = yaml.safe_load(found.group(1)) if found else None
    except (DPOError, yaml.YAMLError, ValueError, RecursionError):  # ValueError: no such date
        return {}
    return said if isinstance(said, dict) else {}


def license_of(files: Files, folder: str) -> dict[str, str]:
    """Return what the start model's card or config.json says of its license: license, license_name, license_link."""
    said = _front_matter(files, folder)
    if "license" not in said:
        said = read_json(files, file_in(folder, "config.json"))
    forms = {"license": _LICENSE, "license_name": _LICENSE, "license_link": _LINK}
    fields = {name: said.get(name) for name in forms}
    return {name: text for name, text in fields.items() if isinstance(text, str) and forms[name].fullmatch(text)}


def hub_id(uri: str) -> str | None:
    """Return ``org/name`` of an address of the hub, of a model or a data set; None for other addresses."""
    if not uri.startswith("hf://"):
        return None
    parts = uri.removeprefix("hf://").removeprefix("datasets/").partition("@")[0].split("/")
    return "/".join(parts[:2])


def model_card(job: DPOJob, trained: Trained, license_: Mapping[str, str], *, adapter: bool = False) -> str:
    """Return the card of the whole model, or of the adapter alone."""
    spec = job.spec
    base = spec.model.source.uri
    losses = [str(loss) for loss, _ in spec.dpo.parts] if spec.dpo.has_preference else ["sft"]
    methods = ["dpo"] if spec.dpo.has_preference else []  # the hub's word for all of them
    sources = {source.uri: hub_id(source.uri) for source in (*spec.data.train, *spec.data.validation)}
    front: dict[str, Any] = {
        "base_model": hub_id(base),
        "datasets": sorted({found for found in sources.values() if found}),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys([TAG, *methods, *losses, *(["lora"] if spec.lora else [])])),
        **license_,
    }
    front = {name: value for name, value in front.items() if value}
    what = "An adapter for" if adapter else "Made from"
    how = f"{what} `{base}` by dpo-operator with the loss {' + '.join(f'`{loss}`' for loss in losses)}"
    steps = f"{counted(trained.last_step, 'step')} of at most {counted(spec.training.global_batch_size, 'pair')}"
    of = "" if trained.step == trained.last_step else f" The weights are those of step {trained.step:,}."
    body = [
        f"# {job.metadata.name}",
        f"{how}: {steps}.{of}",
        "## Data",
        _table(("source", "used for", "pairs", "left out"), _data(spec, trained)),
        "## Settings",
        _table(("setting", "value"), _settings(spec)),
    ]
    validated = [
        (name, number(value))
        for name, value in sorted(trained.metrics.items())
        if name.startswith("val/") and not name.endswith(_NOT_SHOWN)
    ]
    if validated:
        body += [f"## Validation\nAfter step {trained.step:,}, over all pairs used for validation:"]
        body += [_table(("metric", "value"), validated)]
    body += ["## Versions", _table(("software", "version"), _versions())]
    if license_:
        body += ["## License", f"That of the start model: {_license(license_)}."]
    header = yaml.safe_dump(front, sort_keys=True, allow_unicode=True, width=1000)
    return f"---\n{header}---\n\n" + "\n\n".join(body) + "\n"


def _data(spec: DPOJobSpec, trained: Trained) -> Iterator[tuple[str, ...]]:
    used = (("training", spec.data.train, trained.train), ("validation", spec.data.validation, trained.validation))
    for purpose, sources, counts in used:
        for source, count in zip(sources, counts, strict=True):
            weight = f", weight {number(source.weight)}" if source.weight != 1 else ""
            left_out = sum(count["dropped"].values())
            yield source.uri, purpose + weight, f"{count['pairs']:,}", f"{left_out:,}"


def _settings(spec: DPOJobSpec) -> Iterator[tuple[str, str]]:
    """Yield the settings that decide what a model learns, those of the loss first."""
    training = spec.training
    yield from _fields("dpo", spec.dpo.model_dump(mode="json", by_alias=True))
    if spec.lora is not None:
        yield from _fields("lora", spec.lora.model_dump(mode="json", by_alias=True))
    chosen = {"epochs", "maxSteps", "globalBatchSize", "learningRate", "schedule", "weightDecay", "betas", "eps"}
    chosen |= {"gradientClip", "precision", "seed"}
    dumped = training.model_dump(mode="json", by_alias=True)
    yield from _fields("training", {name: value for name, value in dumped.items() if name in chosen})
    yield "data.maxLength", str(spec.data.max_length)


def _fields(path: str, section: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _fields(f"{path}.{name}", value)
        elif value is not None:
            yield f"{path}.{name}", number(value) if isinstance(value, float) else str(value)


def _versions() -> Iterator[tuple[str, str]]:
    yield "dpo-operator", VERSION
    for name in _LIBRARIES:
        yield name, version(name)


def _license(license_: Mapping[str, str]) -> str:
    name = license_.get("license_name") or license_.get("license", "")
    link = license_.get("license_link")
    return f"[{name or link}]({link})" if link else name


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
