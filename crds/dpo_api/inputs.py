"""Sections for the inputs of a run: storage, the start model, the tokenizer and the preference data."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints
from pydantic.alias_generators import to_camel

from dpo_api.fields import (
    DATA_KEY_PATTERN,
    ENDPOINT_PATTERN,
    SOURCE_NAME_PATTERN,
    Bool,
    ConfigMapRef,
    DnsName,
    Float,
    InputUri,
    Int,
    Quantity,
    Rule,
    SecretKeyRef,
    SecretRef,
    Section,
    Text,
    Uri,
)

Column = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=128)]
SourceName = Annotated[str, StringConstraints(strict=True, pattern=SOURCE_NAME_PATTERN, max_length=63)]

URI_FORMS = "s3://bucket/key, pvc://claim/path, or a local path (for `dpo run`)"
_INPUT_FORMS = "hf://org/name@revision, " + URI_FORMS
_DATA_FORMS = "hf://datasets/org/name@revision/path, " + URI_FORMS


def _one_of(*names: str) -> str:
    """Return the CEL sum that counts which of the named optional fields are set."""
    return " + ".join(f"(has(self.{name}) ? 1 : 0)" for name in names)


def _place(endpoint: str) -> tuple[str, str]:
    """Return an endpoint in a form to compare: the case of scheme and host and a final slash do not matter."""
    base = urlsplit(endpoint.rstrip("/"))
    return f"{base.scheme}://{base.netloc}".lower(), base.path


class CABundle(Section):
    """Certificates to trust in addition to the system's."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "",
            "set exactly one of configMapRef, secretRef and path",
            f"{_one_of('configMapRef', 'secretRef', 'path')} == 1",
            lambda s: sum(source is not None for source in (s.config_map_ref, s.secret_ref, s.path)) == 1,
        ),
    )

    config_map_ref: ConfigMapRef | None = Field(default=None, description="A ConfigMap that holds the certificates.")
    secret_ref: SecretRef | None = Field(default=None, description="A Secret that holds the certificates.")
    key: str = Field(
        default="ca.crt",
        pattern=DATA_KEY_PATTERN,
        max_length=253,
        description="Key of the ConfigMap or Secret whose value is PEM.",
    )
    path: Text | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="A PEM file on the machine of `dpo run`, or inside the trainer's image.",
    )


class StorageAccess(Section):
    """How to reach an S3 endpoint.

    Fields that a source does not set are taken from `spec.storage`; credentials only if the endpoint is the same.
    """

    endpoint: Text | None = Field(
        default=None,
        pattern=ENDPOINT_PATTERN,
        max_length=512,
        description="Base URL of the S3 service, such as https://s3.example.com. Not set: the default"
        " of the installation, AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, or else Amazon's.",
    )
    region: Text | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9-]+$",
        max_length=64,
        description="Region that requests are signed for. Not set: the one that boto3 finds, else us-east-1.",
    )
    force_path_style: Bool | None = Field(
        default=None,
        description="Put the bucket in the path instead of the host name, which most S3 services other than AWS"
        " need. Not set: true if `endpoint` is set.",
    )
    credentials_secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with the keys AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, optionally,"
        " AWS_SESSION_TOKEN. Not set: the pod's identity (`serviceAccountName`). `dpo run` uses boto3's usual"
        " chain: environment, ~/.aws, instance identity.",
    )
    ca_bundle: CABundle | None = Field(default=None, description="Certificate authority of a private endpoint.")


class StorageCache(Section):
    """Where downloaded models and token files are kept."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "size",
            "size limits a volume of the pod, but claim is set, whose own size limits the cache; leave size out",
            "!(has(self.size) && has(self.claim))",
            lambda s: s.size is None or s.claim is None,
        ),
    )

    size: Quantity | None = Field(
        default=None,
        description="Size of a volume for the cache alone, such as 500Gi; a pod that exceeds it is evicted, which ends"
        " the job. Not set: the cache is in the scratch volume, which `resources.scratch` limits.",
    )
    claim: DnsName | None = Field(
        default=None,
        description="PersistentVolumeClaim that holds the cache, so that later attempts and other jobs can use it."
        " Not set: the pod's scratch volume. `dpo run` uses $DPO_CACHE_DIR.",
    )


class HubAccess(Section):
    """How to reach the Hugging Face Hub: for `hf://` addresses, and for `output.hub`."""

    token_secret_ref: SecretKeyRef | None = Field(
        default=None,
        description="Key of a Secret that holds an access token, which pods get as HF_TOKEN. Not set: no token. `dpo"
        " run` uses $HF_TOKEN or `hf auth login`.",
    )


class Storage(StorageAccess):
    """How to reach S3 unless a source or output has its own settings, the Hugging Face Hub, and the local cache."""

    hub: HubAccess = Field(default=HubAccess(), description="How to reach the Hugging Face Hub.")
    cache: StorageCache = Field(default=StorageCache(), description="Local copies: each node downloads a file once.")

    def access(self, own: StorageAccess | None = None) -> StorageAccess:
        """Return how to reach a source whose own settings are ``own``. Keys are never sent to another endpoint."""
        own = own or StorageAccess()
        names = [name for name in StorageAccess.model_fields if name != "credentials_secret_ref"]
        chosen = {name: getattr(own, name) if getattr(own, name) is not None else getattr(self, name) for name in names}
        common = self.credentials_secret_ref if self.is_reached_by(own) else None
        return StorageAccess(**chosen, credentials_secret_ref=own.credentials_secret_ref or common)

    def is_reached_by(self, own: StorageAccess | None) -> bool:
        """Return whether a source whose own settings are ``own`` is at the common endpoint."""
        if own is None or own.endpoint is None:
            return True
        return self.endpoint is not None and _place(own.endpoint) == _place(self.endpoint)


class HuggingFaceSource(Section):
    """A model folder in Hugging Face format."""

    uri: InputUri = Field(
        description=f"Folder with config.json, *.safetensors and the tokenizer's files: {_INPUT_FORMS}."
    )
    storage: StorageAccess | None = Field(default=None, description="Access to this source, if not `spec.storage`.")


class NemoSource(Section):
    """A NeMo 1.x archive."""

    uri: Uri = Field(description=f"A .nemo file, or the folder it was unpacked to: {URI_FORMS}.")
    storage: StorageAccess | None = Field(default=None, description="Access to this source, if not `spec.storage`.")


class MegatronSource(Section):
    """A Megatron-Core distributed checkpoint."""

    uri: Uri = Field(description=f"Folder of the checkpoint, or of its iterations: {URI_FORMS}.")
    storage: StorageAccess | None = Field(default=None, description="Access to this source, if not `spec.storage`.")
    iteration: Int | None = Field(
        default=None, ge=0, le=2_000_000_000, description="Which iteration to start from. Not set: the newest."
    )
    architecture_uri: Uri | None = Field(
        default=None,
        alias="architectureURI",
        description="A config.json in Hugging Face format that describes the model, if the checkpoint itself does not.",
    )


class AdapterSource(Section):
    """A LoRA adapter in PEFT's format, such as the result of supervised fine-tuning."""

    uri: Uri = Field(description=f"Folder with adapter_config.json and adapter_model.safetensors: {URI_FORMS}.")
    storage: StorageAccess | None = Field(default=None, description="Access to this source, if not `spec.storage`.")


class Model(Section):
    """The start model, which is also the reference model: exactly one source, with an adapter or without."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "",
            "set exactly one of huggingFace, nemo and megatron",
            f"{_one_of('huggingFace', 'nemo', 'megatron')} == 1",
            lambda s: sum(source is not None for source in (s.hugging_face, s.nemo, s.megatron)) == 1,
        ),
    )

    @property
    def source(self) -> HuggingFaceSource | NemoSource | MegatronSource:
        """The one source that is set."""
        found = self.hugging_face or self.nemo or self.megatron
        assert found is not None  # noqa: S101 - the rule above
        return found

    @property
    def field(self) -> str:
        """The path of the source's address in the spec."""
        name = "huggingFace" if self.hugging_face else "nemo" if self.nemo else "megatron"
        return f"spec.model.{name}.uri"

    hugging_face: HuggingFaceSource | None = Field(default=None, description="A model folder in Hugging Face format.")
    nemo: NemoSource | None = Field(default=None, description="A NeMo 1.x .nemo archive.")
    megatron: MegatronSource | None = Field(default=None, description="A Megatron-Core distributed checkpoint.")
    adapter: AdapterSource | None = Field(
        default=None,
        description="A LoRA adapter that is added to the source's weights. The sum is the start model: the reference,"
        " and what is trained, or gets a new adapter with `lora`. `lora.continueAdapter` trains this adapter on. Not"
        " set: none.",
    )


class Tokenizer(Section):
    """A tokenizer to use instead of the model's own."""

    uri: InputUri = Field(
        description=f"Folder with tokenizer.json or tokenizer.model, or one of these files: {_INPUT_FORMS}."
    )
    storage: StorageAccess | None = Field(default=None, description="Access to this source, if not `spec.storage`.")


DataFormat = Literal["jsonl", "parquet", "arrow"]
TABLES: dict[str, DataFormat] = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
"""The format of a file whose name ends so; all others are JSON lines."""


def data_format(uri: str, stated: DataFormat | None = None) -> DataFormat:
    """Return the format that a source states, else the one that the file's name ends in."""
    if stated is not None:
        return stated
    name = uri.lower()
    return next((found for suffix, found in TABLES.items() if name.endswith(suffix)), "jsonl")


class DataSource(Section):
    """Preference data: one JSON object per line (plain, .gz or .zst), or a table in Parquet or Arrow."""

    uri: InputUri = Field(
        description=f"One object, a prefix that ends in /, or a pattern with *: {_DATA_FORMS}. Files are read in the"
        " order of their names."
    )
    name: SourceName | None = Field(
        default=None,
        description="Name of the source in metrics and messages. Not set: its position, such as `train-0` or"
        " `validation-0`.",
    )
    weight: Float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="How often a pair of this source is used, relative to the pairs of the other sources: with 2 beside"
        " 1, twice as often. An epoch has as many pairs as all sources together. For validation: how much a pair counts"
        " in the means over all sources. Default 1.",
    )
    format: DataFormat | None = Field(
        default=None,
        description="Format of the source's files. Not set: as each file's name ends: .parquet; .arrow, .feather or"
        " .ipc; any other is JSON lines.",
    )
    storage: StorageAccess | None = Field(default=None, description="Access to this source, if not `spec.storage`.")


_FORMS = (
    ("chosen", "rejected", "chosen_reward", "rejected_reward"),
    ("completions", "scores", "ranks"),
    ("preference", "response1", "response2"),
)


class Columns(Section):
    """Keys of a record, if they differ from the usual ones.

    A key of a nested value is a path: `a.b[0]`, `messages[-1].content`, and for lists `answers[].text`.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "",
            "scores and ranks are both set; set one of them",
            "!has(self.scores) || !has(self.ranks)",
            lambda s: s.scores is None or s.ranks is None,
        ),
        Rule(
            "",
            "set the keys of one form: of a pair (chosen, rejected and their rewards), of a ranked list (completions"
            " with scores or ranks), or of a comparison (preference, response1, response2)",
            " + ".join(f"({' || '.join(f'has(self.{to_camel(name)})' for name in form)} ? 1 : 0)" for form in _FORMS)
            + " <= 1",
            lambda s: sum(any(getattr(s, name) is not None for name in form) for form in _FORMS) <= 1,
        ),
    )

    prompt: Column | None = Field(default=None, description="Key of the prompt. Not set: `prompt`.")
    chosen: Column | None = Field(
        default=None, description="Key of the preferred response. Not set: `chosen_response`, else `chosen`."
    )
    rejected: Column | None = Field(
        default=None, description="Key of the other response. Not set: `rejected_response`, else `rejected`."
    )
    chosen_reward: Column | None = Field(
        default=None, description="Key of the preferred response's reward. Not set: `chosen_reward`."
    )
    rejected_reward: Column | None = Field(
        default=None, description="Key of the other response's reward. Not set: `rejected_reward`."
    )
    tools: Column | None = Field(
        default=None,
        description="Key of the tools that are passed to the chat template: a list of JSON schemas, or the same as"
        " JSON text. Not set: `tools`.",
    )
    completions: Column | None = Field(
        default=None, description="Key of a ranked list's responses. Not set: `completions`, if there is no pair."
    )
    scores: Column | None = Field(
        default=None, description="Key of the responses' scores, the highest is the best. Not set: `scores`."
    )
    ranks: Column | None = Field(
        default=None, description="Key of the responses' ranks, the lowest is the best. Not set: `ranks`."
    )
    preference: Column | None = Field(
        default=None,
        description="Key of a score that compares two responses: below 0 the first is better, above 0 the second. Not"
        " set: `overall_preference` or `preference_strength`, if there is no pair.",
    )
    response1: Column | None = Field(
        default=None, description="Key of the first response. Not set: `response1` or `response_1`."
    )
    response2: Column | None = Field(
        default=None, description="Key of the second response. Not set: `response2` or `response_2`."
    )


def _names_differ(sources: tuple[DataSource, ...]) -> bool:
    names = [source.name for source in sources if source.name is not None]
    return len(names) == len(set(names))


def _names_differ_cel(field: str) -> str:
    return (
        f"!has(self.{field}) || self.{field}.all(a, !has(a.name) ||"
        f" self.{field}.exists_one(b, has(b.name) && b.name == a.name))"
    )


class Data(Section):
    """The pairs for training and validation, and how records become tokens."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "train",
            "two sources have the same name; give each its own",
            _names_differ_cel("train"),
            lambda s: _names_differ(s.train),
        ),
        Rule(
            "validation",
            "two sources have the same name; give each its own",
            _names_differ_cel("validation"),
            lambda s: _names_differ(s.validation),
        ),
    )

    train: tuple[DataSource, ...] = Field(min_length=1, max_length=64, description="Sources of the training pairs.")
    validation: tuple[DataSource, ...] = Field(
        default=(),
        max_length=64,
        description="Sources of the validation pairs; each is also reported separately under its name. Not set: no"
        " validation.",
    )
    max_length: Int = Field(
        default=4096,
        ge=2,
        le=1_048_576,
        description="Maximum length in tokens of a prompt with the longer of its responses. Default 4096.",
    )
    over_length: Literal["drop", "truncate", "error"] = Field(
        default="drop",
        description="What to do with a pair that exceeds `maxLength`: `drop` it and count it; `truncate` the end of"
        " its responses, never the prompt; or end the run with an `error`. Default drop.",
    )
    columns: Columns = Field(default=Columns(), description="Keys of a record, if they differ from the usual ones.")
    pairs: Literal["bestWorst", "adjacent", "all"] = Field(
        default="bestWorst",
        description="Pairs that a ranked list gives: the best response with the worst; each with the next one; or all."
        " Equal scores or ranks give none. Default bestWorst.",
    )
    preference_margin: Bool = Field(
        default=False,
        description="Use the size of a preference score as the preferred response's reward, and 0 as the other's."
        " Default false: `dpo.defaultChosenReward` and `dpo.defaultRejectedReward`.",
    )
    on_invalid: Literal["error", "skip"] = Field(
        default="error",
        description="What to do with a record that cannot be used (broken JSON, missing key, empty response): end the"
        " run with an `error` that lists the first five as file:line, or `skip` and count them. Default error.",
    )
    boundary: Literal["strict", "separate"] = Field(
        default="strict",
        description="How prompt and response are joined: `strict` tokenises them together, and the prompt's tokens must"
        " be a prefix of the result; `separate` tokenises the response on its own. Default strict.",
    )
    add_bos: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether a prompt starts with the begin-of-text token: `auto` does what the tokenizer does. It is"
        " never added twice. Default auto.",
    )
    append_eos: Bool = Field(
        default=False,
        description="Append the end-of-text token to each response that is a plain string. Default false: the text"
        " already contains its end token.",
    )
