"""Flags and environment: each flag is also the variable DPO_OPERATOR_<NAME>; the flag takes precedence."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from dpo_api.version import VERSION
from dpo_operator.backend.network import peers
from dpo_operator.config import Settings
from dpo_operator.runtime import podflags

_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SECRET = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_LABEL = re.compile(rf"([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_WORD}")
_LABEL_VALUE = re.compile(rf"({_WORD})?")
_BETWEEN_PAIRS = {
    "extra_env": re.compile(r",(?=[A-Za-z_][A-Za-z0-9_.-]*=)"),
    "labels": re.compile(","),
    "trainer_node_selector": re.compile(","),
    "operator_labels": re.compile(","),
}
"""A comma inside a value, as in NCCL_IB_HCA=mlx5_0,mlx5_1, is not followed by NAME=."""

ScrapeBy = Literal["auto", "pod-ip", "api-proxy", "off"]


@dataclass(frozen=True)
class Options:
    """How this process runs. ``Settings`` decides what it does to jobs."""

    namespaces: tuple[str, ...] = ()
    """Namespaces to watch; empty: all."""
    kubeconfig: str = ""
    log_format: Literal["json", "text"] = "json"
    log_level: str = "info"
    address: str = "0.0.0.0"  # noqa: S104 - probes and Prometheus come from outside the pod
    port: int = 8080
    """Port of /metrics, /healthz and /readyz; 0: any free port; the log names it."""
    tls_cert_file: str = ""
    """Certificate of the port, in PEM; empty: plain HTTP. It is read again when it changes."""
    tls_key_file: str = ""
    metrics_auth: Literal["off", "token"] = "off"
    """Who may read /metrics: anyone, or clients whose token has the right to ``get`` this nonResourceURL."""
    workers: int = 32
    """DPOJobs reconciled concurrently; they mostly wait for the API server."""
    scrape_by: ScrapeBy = "auto"
    scrape_seconds: float = 30.0
    """Interval between two requests to a trainer. With more than 240 running jobs it is their number / 8 (1,000 jobs:
    125 s). Progress alone is written to the status at most once a minute."""
    trainer_metrics_folder: str = "/etc/dpo-trainer-metrics"
    """With ``trainer_metrics_secret``: the folder of ca.crt and token, by which a trainer is known and asked."""
    trainer_metrics_server_name: str = "dpo-trainer"
    """Name that a trainer's certificate must have: pods are asked by IP address."""
    relist_seconds: float = 300.0
    """Interval between two comparisons of the caches with the cluster."""
    dead_watch_seconds: float = 60.0
    """How late a watch may deliver a change before it counts as dead."""
    job_metrics_limit: int = 1000
    """Maximum number of DPOJobs with their own metrics: unfinished ones first, then the newest."""
    selfcheck: bool = False
    """Report what the cluster is missing, and exit."""


def parse(
    arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[Options, Settings]:
    """Read flags and environment. For a mistake it prints one line and exits with code 2, as argparse does."""
    parser = _parser(environment)
    got = vars(parser.parse_args(arguments))
    namespaces = tuple(sorted(set(_parts(got.pop("namespaces")))))
    for namespace in namespaces:
        if not _NAMESPACE.fullmatch(namespace):
            parser.error(f"--namespaces: {namespace!r} is not a namespace name; give names separated by commas")
    settings = Settings()
    given = {f.name: got.pop(f.name) for f in fields(Settings) if got.get(f.name) is not None}
    for name in [f.name for f in fields(Settings)]:
        got.pop(name, None)
    given["network_policies"] = given["network_policies"] == "on"
    for name, between in _BETWEEN_PAIRS.items():
        if name in given:
            flag = f"--{name.replace('_', '-')}"
            given[name] = tuple(_pair(parser, flag, text) for text in between.split(given[name]) if text)
    _check_labels(parser, given)
    given["metrics_from"] = _peers(parser, given["metrics_from"])
    given["trainer_image_pull_secrets"] = _secrets(parser, given["trainer_image_pull_secrets"])
    try:
        given |= podflags.read(given)
    except podflags.FlagError as error:
        parser.error(str(error))
    settings = replace(settings, **given)
    options = Options(namespaces=namespaces, **got)
    _check_metrics_secret(parser, settings.trainer_metrics_secret, options)
    for name in ("scrape_seconds", "relist_seconds", "dead_watch_seconds"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')}: must be above 0")
    _check_server(parser, options)
    return options, settings


def _check_server(parser: argparse.ArgumentParser, options: Options) -> None:
    if bool(options.tls_cert_file) != bool(options.tls_key_file):
        missing = "--tls-key-file" if options.tls_cert_file else "--tls-cert-file"
        parser.error(f"{missing}: not set; HTTPS needs a certificate and its key")
    if options.metrics_auth == "token" and not options.tls_cert_file:
        parser.error(
            "--metrics-auth=token: needs --tls-cert-file, since tokens must not cross the network in clear text"
        )


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _secrets(parser: argparse.ArgumentParser, text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(_parts(text)))
    for name in names:
        if not _SECRET.fullmatch(name):
            parser.error(f"--trainer-image-pull-secrets: {name!r} is not a Secret name; give names separated by commas")
    return names


def _check_labels(parser: argparse.ArgumentParser, given: Mapping[str, Any]) -> None:
    for name in ("labels", "operator_labels"):
        for key, value in given.get(name, ()):
            if not _LABEL.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                written = f"--{name.replace('_', '-')}: {key}={value}"
                parser.error(f"{written} is not a Kubernetes label; give [PREFIX/]NAME=VALUE")
    namespace = given["operator_namespace"]
    if namespace and not _NAMESPACE.fullmatch(namespace):
        parser.error(f"--operator-namespace: {namespace!r} is not a namespace name")


def _peers(parser: argparse.ArgumentParser, text: str) -> tuple[Mapping[str, Any], ...]:
    try:
        return peers(json.loads(text or "[]"))
    except ValueError as error:
        parser.error(
            f"--metrics-from: {error}; give a JSON list of peers as in `from` of a NetworkPolicy, such as"
            ' [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]'
        )


def _check_metrics_secret(parser: argparse.ArgumentParser, secret: str, options: Options) -> None:
    if secret and not _SECRET.fullmatch(secret):
        parser.error(f"--trainer-metrics-secret: {secret!r} is not a Secret name")
    if secret and options.scrape_by == "api-proxy":
        parser.error(
            "--scrape-by: api-proxy cannot pass on the token of --trainer-metrics-secret; give pod-ip or off, "
            "or no --trainer-metrics-secret"
        )


def _pair(parser: argparse.ArgumentParser, flag: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        parser.error(f"{flag}: {text!r} is not NAME=VALUE")
    return name.strip(), value


def _one_of(variable: str, choices: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            words = f"invalid choice: {text!r}; give {', '.join(choices[:-1])} or {choices[-1]}"
            raise argparse.ArgumentTypeError(f"{words}, by the flag or by the variable {variable}")
        return text

    return read


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:  # noqa: PLR0915 - one statement for each flag
    parser = argparse.ArgumentParser(
        prog="dpo-operator",
        description="Runs DPOJobs on Kubernetes through training-operator's PyTorchJob.",
        epilog="Every flag can also be set by an environment variable: --log-format is DPO_OPERATOR_LOG_FORMAT.",
    )
    parser.add_argument("--version", action="version", version=f"dpo-operator {VERSION}")
    parser.add_argument("--selfcheck", action="store_true", help="report what the cluster has and lacks, and exit")

    def flag(name: str, default: Any, text: str, **more: Any) -> None:
        variable = "DPO_OPERATOR_" + name.upper().replace("-", "_")
        if "choices" in more:
            more["type"] = _one_of(variable, more["choices"])
        # argparse parses a default that is a string like a flag's value, but does not check it against ``choices``.
        parser.add_argument(f"--{name}", default=environment.get(variable, default), help=text, **more)

    d, s = Options(), Settings()
    flag("namespaces", "", "comma-separated namespaces to watch; default: all")
    flag("kubeconfig", "", "kubeconfig file; default: $KUBECONFIG, the pod's service account, ~/.kube/config")
    flag("log-format", d.log_format, "json or text; default %(default)s", choices=("json", "text"))
    flag(
        "log-level",
        d.log_level,
        "minimum level of log lines; default %(default)s",
        choices=("debug", "info", "warning", "error"),
    )
    flag("address", d.address, "address of metrics and probes; default %(default)s")
    flag("port", d.port, "port of /metrics, /healthz and /readyz, 0: any; default %(default)s", type=int)
    flag("tls-cert-file", d.tls_cert_file, "certificate of --port in PEM, for HTTPS; default: HTTP")
    flag("tls-key-file", d.tls_key_file, "its key in PEM")
    flag("metrics-auth", d.metrics_auth, choices=("off", "token"),
         text="token: /metrics needs a bearer token that may get this nonResourceURL; default %(default)s")  # fmt: skip
    flag("workers", d.workers, "DPOJobs reconciled concurrently; default %(default)s", type=int)
    flag(
        "scrape-by", d.scrape_by, choices=("auto", "pod-ip", "api-proxy", "off"),
        text="how to reach a trainer's /status; auto: pod-ip in the cluster, api-proxy outside; default %(default)s",
    )  # fmt: skip
    flag(
        "scrape-seconds",
        d.scrape_seconds,
        "interval between requests to a trainer, at least running jobs / 8; default %(default)s",
        type=float,
    )
    flag(
        "trainer-metrics-folder",
        d.trainer_metrics_folder,
        "with --trainer-metrics-secret: folder with ca.crt and token for requests to trainers; default %(default)s",
    )
    flag(
        "trainer-metrics-server-name",
        d.trainer_metrics_server_name,
        "name that the certificates of trainers must have; default %(default)s",
    )
    flag("relist-seconds", d.relist_seconds, "interval between checks of the watches; default %(default)s", type=float)
    flag(
        "dead-watch-seconds",
        d.dead_watch_seconds,
        "delay that makes a watch dead; default %(default)s",
        type=float,
    )
    flag(
        "resync-seconds",
        s.resync_seconds,
        "interval of passes over an idle DPOJob; default %(default)s",
        type=float,
    )
    flag(
        "job-metrics-limit",
        d.job_metrics_limit,
        "DPOJobs with their own metrics, unfinished ones first; default %(default)s",
        type=int,
    )
    # What follows sets Settings.
    flag("trainer-image", s.trainer_image, "trainer image of jobs without spec.image; default %(default)s")
    flag("trainer-image-pull-secrets", "", "comma-separated pull secrets of jobs without their own")
    flag("trainer-annotations", None, 'annotations of every trainer pod, as JSON: {"NAME": "VALUE"}')
    flag("trainer-node-selector", None, "labels of the nodes of every trainer pod: comma-separated NAME=VALUE")
    flag("trainer-tolerations", None, "tolerations of every trainer pod, as JSON: a list as in a pod")
    flag("trainer-runtime-class", s.trainer_runtime_class, "RuntimeClass of jobs that name none")
    flag("trainer-priority-class", s.trainer_priority_class, "PriorityClass of jobs that name none")
    flag("trainer-pod-patch", None, "file with a partial pod template that is merged into every trainer pod")
    flag(
        "default-ttl-seconds-after-finished", None,
        "time after the end until a DPOJob without ttlSecondsAfterFinished is deleted; default: never",
    )  # fmt: skip
    flag(
        "trainer-metrics-secret",
        s.trainer_metrics_secret,
        "Secret in each namespace of jobs with tls.crt, tls.key and token, with which a trainer serves its metrics; "
        "default: plain HTTP without a token",
    )
    flag("default-shm", s.default_shm, "size of /dev/shm on CPU; default %(default)s")
    flag("default-gpu-shm", s.default_gpu_shm, "size of /dev/shm with GPUs; default %(default)s")
    flag("identity-audience", s.identity_audience, "audience of pod-identity tokens; default %(default)s")
    flag("extra-env", None, "environment of every trainer: comma-separated NAME=VALUE; values may contain commas")
    flag("labels", None, "labels of every object the operator creates: comma-separated NAME=VALUE")
    flag("network-policies", "on", choices=("on", "off"),
         text="create a NetworkPolicy for each job; its pods then accept connections only from each other and, for "
         "metrics, from the operator and --metrics-from; default %(default)s")  # fmt: skip
    flag("operator-namespace", s.operator_namespace, "namespace of the operator's pod, for these NetworkPolicies")
    flag(
        "operator-labels", None, "labels of the operator's pod, likewise: comma-separated NAME=VALUE; default: any pod"
    )
    flag("metrics-from", "", "clients of the trainers' metrics: a JSON list of peers, as in `from` of a NetworkPolicy")
    flag("default-queue", s.default_queue, "Kueue LocalQueue of jobs that name none; default: they start immediately")
    flag(
        "backoff-base-seconds",
        s.backoff_base_seconds,
        "back-off of the first restart; default %(default)s",
        type=float,
    )
    flag(
        "backoff-max-seconds",
        s.backoff_max_seconds,
        "longest back-off of a restart; default %(default)s",
        type=float,
    )
    flag(
        "node-failure-toleration-seconds", s.node_failure_toleration_seconds, type=int,
        text="how long pods stay on a node that does not respond; default %(default)s",
    )  # fmt: skip
    flag("progress-write-seconds", s.progress_write_seconds, type=float,
         text="minimum time between status writes that only update progress; default %(default)s")  # fmt: skip
    flag("stalled-after-seconds", s.stalled_after_seconds, type=float,
         text="time without a step after which a job counts as stalled; default %(default)s")  # fmt: skip
    return parser
