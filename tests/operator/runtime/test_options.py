"""Flags and environment of the operator."""

from __future__ import annotations

import pytest

from dpo_operator.config import Settings
from dpo_operator.runtime.options import Options, parse


def test_defaults_are_those_of_the_classes() -> None:
    assert parse([], {}) == (Options(), Settings())


def test_a_flag_wins_over_the_environment() -> None:
    environment = {"DPO_OPERATOR_NAMESPACES": "b,a", "DPO_OPERATOR_PORT": "1", "DPO_OPERATOR_TRAINER_IMAGE": "i:2"}
    options, settings = parse(["--port=2", "--extra-env=NCCL_DEBUG=INFO,NCCL_IB_HCA=mlx5_0,mlx5_1,A=b=c"], environment)
    assert (options.namespaces, options.port) == (("a", "b"), 2)
    assert settings.trainer_image == "i:2"
    assert settings.extra_env == (("NCCL_DEBUG", "INFO"), ("NCCL_IB_HCA", "mlx5_0,mlx5_1"), ("A", "b=c"))


def test_an_empty_variable_is_nothing() -> None:
    """The chart writes every variable, those without a value too."""
    names = ("NAMESPACES", "EXTRA_ENV", "LABELS", "DEFAULT_QUEUE", "TRAINER_IMAGE_PULL_SECRETS")
    assert parse([], dict.fromkeys((f"DPO_OPERATOR_{name}" for name in names), "")) == (Options(), Settings())


def test_labels_are_read_as_kubernetes_takes_them() -> None:
    _, settings = parse(["--labels=sidecar.istio.io/inject=false,team="], {})
    assert settings.labels == (("sidecar.istio.io/inject", "false"), ("team", ""))


def test_pull_secrets_are_names_between_commas() -> None:
    _, settings = parse(["--trainer-image-pull-secrets=pull, other.example,pull"], {})
    assert settings.trainer_image_pull_secrets == ("pull", "other.example")


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--namespaces=Team_A"], {}, "'Team_A' is not a namespace name"),
        (["--scrape-seconds=0"], {}, "--scrape-seconds: must be above 0"),
        (["--extra-env=NCCL"], {}, "'NCCL' is not NAME=VALUE"),
        (["--labels=inject"], {}, "--labels: 'inject' is not NAME=VALUE"),
        (["--labels=Team A/x=y"], {}, "--labels: Team A/x=y is not a Kubernetes label"),
        (["--labels=team=a b"], {}, "--labels: team=a b is not a Kubernetes label"),
        (["--trainer-image-pull-secrets=a,B_c"], {}, "--trainer-image-pull-secrets: 'B_c' is not a Secret name"),
        (["--log-format=xml"], {}, "invalid choice"),
        ([], {"DPO_OPERATOR_PORT": "eighty"}, "invalid int value: 'eighty'"),
        ([], {"DPO_OPERATOR_LOG_LEVEL": "verbose"}, "invalid choice: 'verbose'; give debug, info, warning or error"),
        ([], {"DPO_OPERATOR_SCRAPE_BY": "proxy"}, "'proxy'; give auto, pod-ip, api-proxy or off"),
        ([], {"DPO_OPERATOR_SCRAPE_BY": ""}, "by the flag or by the variable DPO_OPERATOR_SCRAPE_BY"),
    ],
)
def test_a_mistake_is_one_clear_line(
    arguments: list[str], environment: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments, environment)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
