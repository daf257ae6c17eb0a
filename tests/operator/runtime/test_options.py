"""Flags and environment of the operator."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_api.pods import Toleration
from dpo_operator.config import Settings
from dpo_operator.runtime.options import Options, parse

POD_FLAGS = (
    *("TRAINER_ANNOTATIONS", "TRAINER_NODE_SELECTOR", "TRAINER_TOLERATIONS", "TRAINER_RUNTIME_CLASS"),
    *("TRAINER_PRIORITY_CLASS", "DEFAULT_TTL_SECONDS_AFTER_FINISHED", "TRAINER_POD_PATCH"),
)


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
    names = ("NAMESPACES", "EXTRA_ENV", "LABELS", "DEFAULT_QUEUE", "TRAINER_IMAGE_PULL_SECRETS", *POD_FLAGS)
    assert parse([], dict.fromkeys((f"DPO_OPERATOR_{name}" for name in names), "")) == (Options(), Settings())


def test_labels_are_read_as_kubernetes_takes_them() -> None:
    _, settings = parse(["--labels=sidecar.istio.io/inject=false,team="], {})
    assert settings.labels == (("sidecar.istio.io/inject", "false"), ("team", ""))


def test_pull_secrets_are_names_between_commas() -> None:
    _, settings = parse(["--trainer-image-pull-secrets=pull, other.example,pull"], {})
    assert settings.trainer_image_pull_secrets == ("pull", "other.example")


def test_defaults_of_pods_are_read_as_fields_of_a_pod_template() -> None:
    arguments = [
        '--trainer-annotations={"karpenter.sh/do-not-disrupt": "true", "a": "1,b=2"}',
        "--trainer-node-selector=gpu=h100,zone=",
        '--trainer-tolerations=[{"key": "gpu", "operator": "Exists", "tolerationSeconds": 5}]',
        *("--trainer-runtime-class=nvidia", "--trainer-priority-class=low"),
        "--default-ttl-seconds-after-finished=0",
    ]
    _, settings = parse(arguments, {})
    assert settings == Settings(
        trainer_annotations=(("karpenter.sh/do-not-disrupt", "true"), ("a", "1,b=2")),
        trainer_node_selector=(("gpu", "h100"), ("zone", "")),
        trainer_tolerations=(Toleration(key="gpu", operator="Exists", toleration_seconds=5),),
        trainer_runtime_class="nvidia",
        trainer_priority_class="low",
        default_ttl_seconds_after_finished=0,
    )


@pytest.mark.parametrize("more", [[], ["--selfcheck"]])
def test_a_wrong_pod_patch_is_named_at_the_start(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "patch.yaml"
    file.write_text("spec:\n  containers:\n    - name: pytorch\n      command: [sh]\n")
    with pytest.raises(SystemExit) as ended:
        parse([f"--trainer-pod-patch={file}", *more], {})
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert f"--trainer-pod-patch: {file}:4: spec.containers[0].command: may not be set by the pod patch" in said


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
        (["--trainer-annotations=a=b"], {}, "--trainer-annotations: 'a=b' is not JSON"),
        (['--trainer-annotations={"a": 1}'], {}, "--trainer-annotations: a: "),
        (['--trainer-annotations={"dpo-operator.dev/x": "y"}'], {}, "dpo-operator.dev/x is reserved for a controller"),
        (["--trainer-node-selector=gpu"], {}, "--trainer-node-selector: 'gpu' is not NAME=VALUE"),
        (["--trainer-node-selector=gpu=a b"], {}, '--trainer-node-selector: gpu: "a b"'),
        (['--trainer-tolerations=[{"effect": "No"}]'], {}, '--trainer-tolerations: [0].effect: "No"'),
        (['--trainer-tolerations={"key": "a"}'], {}, "--trainer-tolerations: "),
        (["--trainer-runtime-class=A_b"], {}, '--trainer-runtime-class: "A_b"'),
        (["--trainer-priority-class=A_b"], {}, '--trainer-priority-class: "A_b"'),
        (["--default-ttl-seconds-after-finished=1d"], {}, "--default-ttl-seconds-after-finished: '1d' is not a whole"),
        (["--default-ttl-seconds-after-finished=-1"], {}, "--default-ttl-seconds-after-finished: '-1' is not a whole"),
        (["--trainer-pod-patch=/no/such.yaml"], {}, "--trainer-pod-patch: /no/such.yaml: no such file"),
        (["--trainer-metrics-secret=B_c"], {}, "--trainer-metrics-secret: 'B_c' is not a Secret name"),
        (["--trainer-metrics-secret=a", "--scrape-by=api-proxy"], {}, "api-proxy cannot pass on the token"),
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
