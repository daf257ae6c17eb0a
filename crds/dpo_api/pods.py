"""The pod fields that a user can set: a closed list that is merged into the trainer's pods.

The operator sets everything else (security context of the container, command, service account).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from dpo_api.fields import (
    ENV_NAME_PATTERN,
    MOUNT_PATH_PATTERN,
    SECONDS_MAX,
    AnnotationValue,
    Bool,
    DnsName,
    Int,
    LabelKey,
    LabelValue,
    OpenObject,
    Rule,
    SecretRef,
    Section,
    Text,
)

EnvName = Annotated[str, StringConstraints(strict=True, pattern=ENV_NAME_PATTERN, min_length=1, max_length=253)]


class Toleration(Section):
    """Lets pods run on nodes with a taint."""

    key: LabelKey | None = Field(default=None, description="Key of the taint. Not set: every key.")
    operator: Literal["Exists", "Equal"] = Field(default="Equal", description="How key and value match. Default Equal.")
    value: LabelValue | None = Field(default=None, description="Value of the taint, for operator Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect of the taint. Not set: every effect."
    )
    toleration_seconds: Int | None = Field(
        default=None, ge=0, le=SECONDS_MAX, description="Seconds that NoExecute is tolerated. Not set: forever."
    )


class EnvVar(Section):
    """One environment variable of the trainer."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "",
            "set value or valueFrom, not both",
            "!(has(self.value) && has(self.valueFrom))",
            lambda s: s.value is None or s.value_from is None,
        ),
    )

    name: EnvName = Field(description="Name of the variable.")
    value: Annotated[str, StringConstraints(strict=True, max_length=4096)] | None = Field(
        default=None, description="Value as plain text. For secrets use valueFrom.secretKeyRef."
    )
    value_from: OpenObject | None = Field(
        default=None, description="Where the value comes from, as in a pod (secretKeyRef, configMapKeyRef, fieldRef)."
    )


class VolumeMount(Section):
    """Where a volume of `volumes` appears in the trainer's container."""

    name: DnsName = Field(description="Name of the volume.")
    mount_path: Annotated[str, StringConstraints(strict=True, pattern=MOUNT_PATH_PATTERN, max_length=1024)] = Field(
        description="Absolute path inside the container."
    )
    sub_path: Text | None = Field(default=None, max_length=1024, description="Path inside the volume.")
    read_only: Bool = Field(default=False, description="Mount it read-only. Default false.")


GroupId = Annotated[Int, Field(ge=0, le=2_147_483_647)]


class PodSecurity(Section):
    """User and group of the pods' files and processes. The rest of the security context is fixed."""

    run_as_user: Int | None = Field(
        default=None, ge=1, le=2_147_483_647, description="User ID. Not set: the image's (never root)."
    )
    run_as_group: Int | None = Field(default=None, ge=0, le=2_147_483_647, description="Group ID. Not set: 0.")
    fs_group: Int | None = Field(
        default=None, ge=0, le=2_147_483_647, description="Group that owns mounted volumes, if the driver supports it."
    )
    supplemental_groups: tuple[GroupId, ...] = Field(default=(), max_length=64, description="Additional group IDs.")


class PodTemplate(Section):
    """Fields that are merged into the trainer's pods."""

    labels: dict[LabelKey, LabelValue] = Field(default={}, max_length=64, description="Labels of the pods.")
    annotations: dict[LabelKey, AnnotationValue] = Field(
        default={}, max_length=64, description="Annotations of the pods."
    )
    node_selector: dict[LabelKey, LabelValue] = Field(
        default={}, max_length=64, description="Labels that a node must have."
    )
    tolerations: tuple[Toleration, ...] = Field(default=(), max_length=64, description="Taints that the pods tolerate.")
    affinity: OpenObject | None = Field(default=None, description="Affinity, as in a pod.")
    topology_spread_constraints: tuple[OpenObject, ...] = Field(
        default=(), max_length=16, description="Topology spread constraints, as in a pod."
    )
    priority_class_name: DnsName | None = Field(
        default=None, description="Kubernetes PriorityClass of the pods. Not set: the cluster's default."
    )
    scheduler_name: DnsName | None = Field(default=None, description="Scheduler of the pods. Not set: the cluster's.")
    runtime_class_name: DnsName | None = Field(
        default=None, description="RuntimeClass of the pods, such as nvidia. Not set: the cluster's."
    )
    image_pull_secrets: tuple[SecretRef, ...] = Field(
        default=(), max_length=16, description="Secrets for pulling images."
    )
    env: tuple[EnvVar, ...] = Field(
        default=(), max_length=128, description="Additional environment variables of the trainer, such as NCCL_*."
    )
    volumes: tuple[OpenObject, ...] = Field(default=(), max_length=64, description="Additional volumes, as in a pod.")
    volume_mounts: tuple[VolumeMount, ...] = Field(
        default=(), max_length=64, description="Mounts of the additional volumes in the trainer's container."
    )
    sidecars: tuple[OpenObject, ...] = Field(
        default=(),
        max_length=8,
        description="Containers that run next to the trainer, as in a pod. They are init containers with restartPolicy"
        " Always, so that they do not keep a finished pod running.",
    )
    security: PodSecurity = Field(default=PodSecurity(), description="User and groups of the pods.")
