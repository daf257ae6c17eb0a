"""Checks what a job refers to before anything is loaded: data sources, model folder, tokenizer, output locations."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Thread

from dpo_api.errors import DPOError, InvalidModelError, InvalidSpecError, Outcome, StorageUnavailableError
from dpo_api.findings import Finding
from dpo_api.inputs import DataFormat, data_format
from dpo_api.models import ModelConfig, ModelFacts, read_config
from dpo_api.models.adapter import continued, read_adapter
from dpo_api.models.folder import VOCABULARIES, check_tokenizer
from dpo_api.models.megatron.outgoing import check_formats
from dpo_api.models.start import check_tokenizer as check_start_tokenizer
from dpo_api.models.start import check_weights, start_model, weight_bytes
from dpo_api.spec import DataSource, DPOJobSpec, HubAccess, Lora, OutputHub, StorageAccess
from dpo_cli.stores import PATIENCE, Stores
from dpo_store import HubMissingError, ObjectInfo, Store, base_name, is_remote
from dpo_store.push import Branch

SAMPLE_BYTES = 256 * 1024
"""Bytes read from each plain-text object to estimate its number of lines."""
COMPRESSED = (".gz", ".zst")
WORKERS = 8
PEEK_SECONDS = 5.0
"""Longest wait for the model's config.json in commands that can do without it."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Problem:
    """A finding and how a run would end because of it."""

    finding: Finding
    outcome: Outcome


@dataclass(frozen=True)
class SourceSeen:
    """A data source that exists: its size, and an estimate of its lines (None for compressed objects and tables)."""

    label: str
    uri: str
    objects: int
    size: int
    lines: int | None


@dataclass(frozen=True)
class Survey:
    """The results of all checks. `facts` is None if the model's configuration was not read or is invalid."""

    problems: tuple[Problem, ...] = ()
    facts: ModelFacts | None = None
    model_bytes: int = 0
    train: tuple[SourceSeen, ...] = ()
    validation: tuple[SourceSeen, ...] = ()
    lora: Lora | None = None
    """The job's ``lora`` with what it takes from the adapter that it continues; None if it continues none."""

    def settled(self, spec: DPOJobSpec) -> DPOJobSpec:
        """Return the spec with the settings of the adapter that it continues, as the trainer reads it."""
        return spec if self.lora is None else spec.model_copy(update={"lora": self.lora})

    @property
    def estimated_pairs(self) -> int | None:
        """About how many lines the training sources hold, or None if one of them cannot be estimated."""
        lines = [source.lines for source in self.train]
        return sum(count for count in lines if count is not None) if lines and None not in lines else None


@dataclass
class _Result:
    problems: list[Problem] = field(default_factory=list)
    facts: ModelFacts | None = None
    model_bytes: int = 0
    source: SourceSeen | None = None
    lora: Lora | None = None


def survey(spec: DPOJobSpec, *, here: bool) -> Survey:
    """Check everything that the spec reads, and where it writes; return all problems at once.

    `here`: the job will run on this machine, so a PersistentVolumeClaim that is not mounted is an error, not a note.
    """
    stores = Stores(spec)
    look = _Look(stores, here)
    tasks: list[Callable[[], _Result]] = [lambda: look.model(spec)]
    for kind, sources in (("train", spec.data.train), ("validation", spec.data.validation)):
        for index, source in enumerate(sources):
            tasks.append(
                _bound(look.source, f"spec.data.{kind}[{index}].uri", source, source.name or f"{kind}-{index}")
            )
    tasks += [_bound(look.bucket, name, uri, access) for name, uri, access in _written(spec)]
    if spec.output.hub is not None:
        tasks.append(_bound(look.hub, spec.output.hub, spec.storage.hub))
    with ThreadPoolExecutor(WORKERS) as pool:
        model, *rest = [future.result() for future in [pool.submit(task) for task in tasks]]
    count = len(spec.data.train)
    seen = [result.source for result in rest]
    return Survey(
        problems=tuple(problem for result in (model, *rest) for problem in result.problems),
        facts=model.facts,
        model_bytes=model.model_bytes,
        train=tuple(source for source in seen[:count] if source is not None),
        validation=tuple(source for source in seen[count:] if source is not None),
        lora=model.lora,
    )


def survey_model(spec: DPOJobSpec) -> Survey:
    """Read the model's config.json, and a continued adapter, if that takes at most ``PEEK_SECONDS``.

    For commands that do not look at model and data, because often only the cluster can reach them. Problems are not
    reported.
    """
    source, found, stores = spec.model.source, _Result(), Stores(spec)

    def read() -> None:
        with suppress(DPOError):
            config = read_config(*start_model(stores.reach(source.storage), spec.model))
            if spec.lora is not None and spec.lora.continue_adapter:
                _Look(stores, here=True).adapter(spec, config, found)
                if found.lora is None:  # without its rank there is no layout to choose
                    return
            found.facts = config.facts

    # A daemon: the command does not wait for a storage that does not answer.
    reader = Thread(target=read, daemon=True)
    reader.start()
    reader.join(PEEK_SECONDS)
    return Survey(facts=found.facts, lora=found.lora)


def _bound[**P](function: Callable[P, _Result], *arguments: P.args, **named: P.kwargs) -> Callable[[], _Result]:
    return lambda: function(*arguments, **named)


def _written(spec: DPOJobSpec) -> list[tuple[str, str, StorageAccess | None]]:
    places = [
        ("spec.checkpoint.uri", spec.checkpoint.uri, spec.checkpoint.storage),
        ("spec.output.uri", spec.output.uri, spec.output.storage),
        ("spec.reference.cacheURI", spec.reference.cache_uri, spec.reference.storage),
    ]
    return [(name, uri, access) for name, uri, access in places if uri is not None and is_remote(uri)]


class _Look:
    def __init__(self, stores: Stores, here: bool) -> None:
        self._stores = stores
        self._here = here

    def _problem(self, name: str, uri: str, error: DPOError, hint: str = "") -> Problem:
        if uri.startswith("pvc://") and not self._here and not os.environ.get("DPO_PVC_ROOT"):
            return Problem(
                Finding("note", name, f"{uri} is on a PersistentVolumeClaim, which cannot be checked from here"),
                Outcome.Succeeded,
            )
        if isinstance(error, HubMissingError):
            text = f"{uri} is not checked here: huggingface_hub is not installed"
            return Problem(Finding("note", name, text), Outcome.Succeeded)
        return Problem(Finding("error", name, f"{error}{hint}"), error.outcome)

    def source(self, name: str, source: DataSource, label: str) -> _Result:
        store = self._stores.reach(source.storage)
        try:
            found = store.expand(source.uri)
            lines = estimate_lines(store, found, source.format)
        except DPOError as error:
            return _Result([self._problem(name, source.uri, error)])
        return _Result(source=SourceSeen(label, source.uri, len(found), sum(info.size for info in found), lines))

    def model(self, spec: DPOJobSpec) -> _Result:
        source, tokenizer = spec.model.source, spec.tokenizer
        result = _Result()
        self._folder(spec, self._stores.reach(source.storage), result, with_tokenizer=tokenizer is None)
        if tokenizer is not None:
            result.problems += self._tokenizer(tokenizer.uri, self._stores.reach(tokenizer.storage))
        return result

    def _folder(self, spec: DPOJobSpec, store: Store, result: _Result, *, with_tokenizer: bool) -> None:
        """Check the start model: its configuration, weights and, unless the spec names another, its tokenizer."""
        name, (files, uri) = spec.model.field, start_model(store, spec.model)
        try:
            config = read_config(files, uri)
            result.facts = config.facts
            self.adapter(spec, config, result)
            check_formats(config, spec.output.converted)
        except InvalidModelError as error:
            result.problems.append(self._problem(name, uri, error))
        except InvalidSpecError as error:
            name, _, why = str(error).partition(": ")
            result.problems.append(Problem(Finding("error", name, why), error.outcome))
        except DPOError as error:  # no such folder, or no access to it: the other checks would fail for the same reason
            hint = hub_hint(uri) or _similar(store, uri, error)
            result.problems.append(self._problem(name, uri, error, hint))
            return
        checks: list[Callable[[], None]] = [lambda: check_weights(files, uri)]
        if with_tokenizer:
            checks.append(lambda: check_start_tokenizer(files, uri))
        for check in checks:
            try:
                check()
            except DPOError as error:
                problem = self._problem(name, uri, error)
                if problem not in result.problems:  # an archive's config.json is made from its weights, too
                    result.problems.append(problem)
        if all(problem.finding.level == "warning" for problem in result.problems):
            result.model_bytes = weight_bytes(files, uri)

    def adapter(self, spec: DPOJobSpec, config: ModelConfig, result: _Result) -> None:
        """Check the start model's adapter, if it has one, against the model and what the job says of it."""
        source = spec.model.adapter
        if source is None:
            return
        try:
            adapter = read_adapter(self._stores.reach(source.storage), source.uri, config)
        except DPOError as error:
            result.problems.append(self._problem("spec.model.adapter.uri", source.uri, error))
            return
        if (base := adapter.other_base(spec.model.source.uri)) is not None:
            text = f"the adapter was made for {base}, not for {spec.model.source.uri}; check that the weights agree"
            finding = Finding("warning", "spec.model.adapter.uri", text)
            result.problems.append(Problem(finding, Outcome.Succeeded))
        if spec.lora is not None and spec.lora.continue_adapter:
            result.lora = continued(spec.lora, adapter, config)

    def _tokenizer(self, uri: str, store: Store) -> list[Problem]:
        """Check what ``spec.tokenizer`` names: a folder, or one file that is a tokenizer by itself."""
        try:
            names = store.children(uri)
            if not names and base_name(uri) in VOCABULARIES:
                names = [base_name(store.stat(uri).uri)]
            check_tokenizer(uri, names)
        except DPOError as error:
            return [self._problem("spec.tokenizer.uri", uri, error)]
        return []

    def bucket(self, name: str, uri: str, access: StorageAccess | None) -> _Result:
        """Check that the location can be reached, so that a mistyped bucket is found before training, not after it."""
        try:
            self._stores.reach(access).children(uri)
        except DPOError as error:
            return _Result([self._problem(name, uri, error)])
        return _Result()

    def hub(self, target: OutputHub, access: HubAccess) -> _Result:
        """Check that the token of this machine may push to the repository, unless pods use another one."""
        name, secret = "spec.output.hub", access.token_secret_ref
        if secret is not None and not self._here:
            text = f"the token of Secret {secret.name}, which may not be read here, is checked when the job starts"
            return _Result([Problem(Finding("note", name, text), Outcome.Succeeded)])
        try:
            Branch(target.repository, target.revision, policy=PATIENCE).check()
        except StorageUnavailableError as error:  # it may be back when there is a model to push
            return _Result([Problem(Finding("warning", name, str(error)), Outcome.Succeeded)])
        except DPOError as error:
            return _Result([self._problem(name, target.uri, error)])
        return _Result()


def hub_hint(uri: str) -> str:
    """Return advice for an address that looks like a name on the Hugging Face Hub; empty otherwise."""
    if _HUB_NAME.fullmatch(uri) is None:
        return ""
    return f"; for a model of the Hugging Face Hub, write hf://{uri}"


def _similar(store: Store, folder: str, error: DPOError) -> str:
    """Return "; did you mean …?" for a folder that does not exist but is named like one that does."""
    if error.outcome is not Outcome.NotFound:
        return ""
    try:
        store.expand(folder.rstrip("/") + "/")
    except DPOError as missing:
        return "".join(str(missing).partition("; did you mean ")[1:])
    return ""


def estimate_lines(store: Store, objects: Sequence[ObjectInfo], stated: DataFormat | None = None) -> int | None:
    """Return an estimate of the number of lines, from the head of each object; None if one is compressed or a table.

    Exact for an object that is not longer than its head.
    """
    total = 0.0
    for info in objects:
        if info.uri.endswith(COMPRESSED) or data_format(info.uri, stated) != "jsonl":
            return None
        head = store.read(info, 0, min(info.size, SAMPLE_BYTES)) if info.size else b""
        if info.size <= SAMPLE_BYTES:
            total += sum(1 for line in head.split(b"\n") if line.strip())
        else:
            total += info.size / len(head) * max(1, head.count(b"\n"))
    return round(total)
