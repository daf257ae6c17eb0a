"""The table of reasons: one row for each, with its words and all of its properties."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum

from dpo_api.errors import Outcome
from dpo_operator.reasons.row import WEAK, Row, cause, cause_of


class Reason(Row, Enum):
    """A reason; its columns are its attributes. The member's name and value are the word."""

    def __new__(cls, row: Row) -> Reason:  # noqa: PYI034 - an Enum's members have the Enum's own type
        """Make the member whose value is the row's word."""
        member = object.__new__(cls)
        member._value_ = row.word
        return member

    def __init__(self, row: Row) -> None:
        for column in fields(Row):
            object.__setattr__(self, column.name, getattr(row, column.name))

    def __repr__(self) -> str:
        return f"Reason.{self.name}"

    # -- whether a job is accepted

    Accepted = Row(
        word="Accepted",
        topic="acceptance",
        event="Normal",
        meaning="The spec is valid. Image and spec are pinned in the job's ConfigMap.",
        remedy="Nothing. The message lists warnings, if there are any.",
    )
    Rejected = Row(
        word="Rejected",
        topic="acceptance",
        event="Warning",
        meaning="The spec is invalid. The message lists every error with its field, its value and the fix.",
        remedy=(
            "Correct the manifest and apply it again, or `kubectl edit` the job: it is checked again."
            " `dpo validate --cluster FILE` finds the same errors before you apply it."
        ),
    )
    ChildInvalid = Row(
        word="ChildInvalid",
        topic="acceptance",
        event="Warning",
        meaning="The API server rejects the PyTorchJob because a field inside podTemplate is invalid.",
        remedy="Correct the field of podTemplate that the message names and apply the job again.",
    )

    # -- what a job is doing

    SpecUnreadable = Row(
        word="SpecUnreadable",
        topic="progress",
        event="Warning",
        meaning="A newer operator accepted the job, and this one cannot read its spec.",
        remedy="Upgrade the operator. It does not touch the running attempt.",
    )
    PinnedSpecChanged = Row(
        word="PinnedSpecChanged",
        topic="progress",
        event="Warning",
        meaning=(
            "The job's ConfigMap does not hold the accepted spec, or it is gone and cannot be made again from the"
            " DPOJob. No attempt is started, and none is charged."
        ),
        remedy=(
            "Delete the ConfigMap: the operator makes it again if the DPOJob still gives the accepted digest. If the"
            " message says that it does not, create the DPOJob again: it continues from its checkpoint."
        ),
    )
    PyTorchJobMissing = Row(
        word="PyTorchJobMissing",
        topic="progress",
        event="Warning",
        meaning="The cluster has no PyTorchJob resource, so nothing can be started.",
        remedy="Install training-operator v1 (v1.9.4). Jobs then continue automatically.",
    )
    ChildRefused = Row(
        word="ChildRefused",
        topic="progress",
        event="Warning",
        meaning="The API server refused to create an object: a quota, an admission policy or missing permissions.",
        remedy="Raise the quota, or change the policy or the permissions. The operator retries every minute.",
    )
    ChildNameTaken = Row(
        word="ChildNameTaken",
        topic="progress",
        event="Warning",
        meaning="The name of the next PyTorchJob, ConfigMap or NetworkPolicy is taken by an object of another owner.",
        remedy="Rename or delete that object, or create the job under another name.",
    )
    WaitingForNamesake = Row(
        word="WaitingForNamesake",
        topic="progress",
        event="Normal",
        meaning="A deleted DPOJob of the same name still has a PyTorchJob or pods that are terminating.",
        remedy="Wait. If a pod hangs on a dead node, delete the node or force-delete the pod.",
    )
    Queued = Row(
        word="Queued",
        topic="progress",
        event="Normal",
        meaning="Kueue keeps the PyTorchJob suspended until its queue has room. A restart queues again.",
        remedy="`kubectl get workloads` shows the position in the queue. Time in the queue counts against no limit.",
    )
    Starting = Row(
        word="Starting",
        topic="progress",
        meaning="Pods are being created or scheduled, or are pulling their image.",
        remedy="Wait. After runPolicy.startTimeoutSeconds the attempt is ended and retried.",
    )
    Unschedulable = Row(
        word="Unschedulable",
        topic="progress",
        event="Warning",
        rank=6,
        meaning="No node has room for a pod; the message is the scheduler's.",
        remedy="Free or add nodes, or request less in spec.resources.",
    )
    ImagePullFailed = Row(
        word="ImagePullFailed",
        topic="progress",
        event="Warning",
        rank=2,
        meaning="A node cannot pull the trainer's image; the message is the kubelet's.",
        remedy="Check spec.image (or the operator's default image) and podTemplate.imagePullSecrets.",
    )
    ContainerConfigError = Row(
        word="ContainerConfigError",
        topic="progress",
        event="Warning",
        rank=3,
        meaning=(
            "A container cannot be created: a Secret, ConfigMap or key is missing, or the image would run as root."
        ),
        remedy="Create what the message names; the pod then starts without a restart.",
    )
    VolumeNotMounted = Row(
        word="VolumeNotMounted",
        topic="progress",
        event="Warning",
        rank=5,
        meaning=(
            "A volume cannot be mounted: a PersistentVolumeClaim, Secret or ConfigMap is missing or in use elsewhere."
        ),
        remedy="Create what the message names, or use a PersistentVolumeClaim with access mode ReadWriteMany.",
    )
    PodsRefused = Row(
        word="PodsRefused",
        topic="progress",
        event="Warning",
        rank=4,
        meaning="training-operator is not allowed to create the pods: a quota, Pod Security or a webhook.",
        remedy="Raise the quota or change the policy. For Pod Security, the message names the fields.",
    )
    InitContainerRefused = Row(
        word="InitContainerRefused",
        topic="progress",
        event="Warning",
        rank=1,
        meaning="The init container that training-operator adds to every worker is refused or cannot be pulled.",
        remedy=(
            "Set training-operator's flag --pytorch-init-container-image to an image that the nodes can pull, and its"
            " template /etc/config/initContainer.yaml to one with a restricted securityContext."
        ),
    )
    Running = Row(
        word="Running",
        topic="progress",
        meaning="All pods are running; the message gives phase and step.",
        remedy="Nothing.",
    )
    Checkpointing = Row(
        word="Checkpointing",
        topic="progress",
        event="Normal",
        meaning="The pods were asked to write a checkpoint and stop, within checkpoint.gracePeriodSeconds.",
        remedy="Wait.",
    )
    Restarting = Row(
        word="Restarting",
        topic="progress",
        event="Normal",
        meaning="An attempt has ended. The next one starts after a back-off that grows with consecutive failures.",
        remedy="See the attempt's reason in status.attempts.",
    )
    Suspended = Row(
        word="Suspended",
        topic="progress",
        event="Normal",
        ended_by_operator=True,
        meaning="runPolicy.suspend is true: the attempt wrote a checkpoint and released its nodes.",
        remedy=(
            "Set runPolicy.suspend to false to continue from the checkpoint. It does not count against"
            " runPolicy.maxRestarts."
        ),
    )
    Resumed = Row(
        word="Resumed",
        topic="progress",
        event="Normal",
        meaning="runPolicy.suspend was true and is false again.",
        remedy="Nothing.",
    )

    Retried = Row(
        word="Retried",
        topic="progress",
        event="Normal",
        meaning="The job had failed, and its annotation dpo-operator.dev/retry has a new value.",
        remedy="Nothing. The next attempt continues from the newest checkpoint, with all of runPolicy.maxRestarts.",
    )

    # -- why an attempt ended: what Kubernetes did or saw

    MemoryLimitExceeded = cause(
        "MemoryLimitExceeded",
        "The trainer's container used more memory than its limit (spec.resources.memory, or the namespace's default).",
        "Raise spec.resources.memory, or lower data.maxLength or training.packing.maxTokens.",
        "permanent",
    )
    ScratchLimitExceeded = cause(
        "ScratchLimitExceeded",
        "The pod was evicted because its scratch volume or /dev/shm exceeded its size limit.",
        "Raise spec.resources.scratch, shm or storage.cache.size, or keep the cache on a PersistentVolumeClaim"
        " (storage.cache.claim).",
        "permanent",
    )
    NodeOutOfMemory = cause(
        "NodeOutOfMemory",
        "The node ran out of memory before the container reached a memory limit.",
        "Set spec.resources.memory so that the scheduler reserves it.",
        "infrastructure",
        suspects="its node",
    )
    NodeLost = cause(
        "NodeLost",
        "A node stopped responding, was removed, or lost its containers in a reboot.",
        "Nothing. The next attempt prefers other nodes.",
        "infrastructure",
        suspects="its node",
    )
    Evicted = cause(
        "Evicted",
        "The kubelet evicted the pod because its node was short of a resource.",
        "Check the node's conditions (memory, disk, processes).",
        "infrastructure",
        suspects="its node",
    )
    Preempted = cause(
        "Preempted",
        "The scheduler preempted the pod for one of higher priority.",
        "Nothing, or give the job a priorityClassName.",
        "infrastructure",
    )
    Drained = cause(
        "Drained",
        "The pod was evicted through the API, for example by `kubectl drain`.",
        "Nothing. The next attempt prefers other nodes.",
        "infrastructure",
        suspects="its node",
    )
    NodeShutdown = cause(
        "NodeShutdown",
        "The node was shut down gracefully.",
        "Nothing. The next attempt prefers other nodes.",
        "infrastructure",
        suspects="its node",
    )
    AdmissionFailed = cause(
        "AdmissionFailed",
        "The kubelet rejected a pod that was scheduled to its node, for example because a GPU had just failed.",
        "Check the node's devices if it happens on the same node again.",
        "infrastructure",
        suspects="its node",
    )
    PodDeleted = cause(
        "PodDeleted",
        "A running pod was deleted.",
        "Nothing. To stop a job set runPolicy.suspend.",
        "infrastructure",
        rank=WEAK + 1,
    )
    PodVanished = cause(
        "PodVanished",
        "A pod is gone, and how it ended is unknown.",
        "Nothing. Check the cluster's events if it happens often.",
        "infrastructure",
        rank=WEAK + 5,
    )
    ChildDeleted = cause(
        "ChildDeleted",
        "The attempt's PyTorchJob was deleted, but not by the operator.",
        "Nothing. To stop a job set runPolicy.suspend.",
        "infrastructure",
        rank=WEAK,
    )
    ContainerStartFailed = cause(
        "ContainerStartFailed",
        "The container could not be started, for example because the image has no Python or a device is broken.",
        "Check spec.image and the node that the message names.",
        "retryable",
        suspects="its node",
    )
    InitContainerFailed = cause(
        "InitContainerFailed",
        "training-operator's init container gave up before the master's name was in the cluster's DNS, where it is once"
        " the master runs.",
        "Use the chart's template of the init container, which does not give up; with training-operator's own template,"
        " raise its flag --pytorch-init-container-max-tries. If it happens while the master runs, check the cluster's"
        " DNS.",
        "retryable",
        charged="after start time-out",
    )
    Killed = cause(
        "Killed",
        "The trainer was killed by a signal, and nothing shows who sent it.",
        "Check the pod's log (`kubectl logs`) and the node's kernel log.",
        "retryable",
        suspects="its node",
    )
    FinalWordsLost = cause(
        "FinalWordsLost",
        "The PyTorchJob succeeded, but rank 0's termination message, which proves the export, is missing.",
        "Nothing. The next attempt checks the run directory, and ends at once if the model is there.",
        "retryable",
        rank=WEAK + 4,
    )
    StartTimeout = cause(
        "StartTimeout",
        "Not all pods were running within runPolicy.startTimeoutSeconds of admitted time; the message says why.",
        "Fix what the message names. The next attempt prefers other nodes. No GPUs are held meanwhile.",
        "retryable",
        suspects="its node",
        ended_by_operator=True,
    )
    Stalled = cause(
        "Stalled",
        "No step within runPolicy.stallTimeoutSeconds although the trainer answered; the operator ended the attempt.",
        "Read the attempt's log. For NCCL, it has the flight record of the last collectives.",
        "retryable",
        ended_by_operator=True,
    )

    # -- why an attempt ended: what the trainer reported

    Internal = cause_of(Outcome.Internal, "Read the log and report the error.", suspects="its node")
    InvalidSpec = cause_of(Outcome.InvalidSpec, "Correct the field that the message names and create the job again.")
    InvalidData = cause_of(
        Outcome.InvalidData, "Correct the lines that the message names, or set data.onInvalid to skip."
    )
    InvalidModel = cause_of(Outcome.InvalidModel, "Upload the model again, or start from another one.")
    NonFinite = cause_of(
        Outcome.NonFinite, "Lower training.learningRate; check the data around the step that the message names."
    )
    OutOfMemory = cause_of(
        Outcome.OutOfMemory, "Lower training.packing.maxTokens or data.maxLength, use lora, or use more GPUs."
    )
    LayoutTooLarge = cause_of(
        Outcome.LayoutTooLarge,
        "Nothing: it happens once. To avoid it in the next job, set the sizes of the layout that fits, which the"
        " message names.",
    )
    NoSpace = cause_of(Outcome.NoSpace, "Free or enlarge the disk or quota that the message names.")
    IncompatibleCheckpoint = cause_of(
        Outcome.IncompatibleCheckpoint, "Give the job its own run directory (checkpoint.uri)."
    )
    Fenced = cause_of(Outcome.Fenced, "Two jobs share a run directory: give each its own (checkpoint.uri).")
    AccessDenied = cause_of(
        Outcome.AccessDenied,
        "Check storage.credentialsSecretRef, storage.hub.tokenSecretRef or the service account's role.",
    )
    NotFound = cause_of(Outcome.NotFound, "Check the address that the message names.")
    PortInUse = cause_of(Outcome.PortInUse, "Remove the sidecar that uses port 9400 or 23456.")
    WrongLayout = cause_of(
        Outcome.WrongLayout,
        "Set another spec.parallelism, or use another image or other nodes (a GPU may compute wrong results), and"
        " report it with the message.",
    )
    Usage = cause_of(Outcome.Usage, "The image is older than the operator: use one of the same version.")
    StorageUnavailable = cause_of(
        Outcome.StorageUnavailable, "Check the S3 service; raise runPolicy.maxRestarts to survive a long outage."
    )
    Communication = cause_of(
        Outcome.Communication,
        "If it happened once: nothing. If it happens often: check the network between nodes, NCCL's settings and the"
        " GPUs. The next attempt prefers other nodes than those whose pods reported nothing.",
        suspects="silent nodes",
        rank=WEAK + 2,
    )
    DeviceFailed = cause_of(
        Outcome.DeviceFailed,
        "Look for the driver's Xid in the node's kernel log; drain the node if it happens again.",
        suspects="its node",
    )
    Stopped = cause_of(Outcome.Stopped, "Nothing. The next attempt continues from its checkpoint.", rank=WEAK + 3)

    # -- why a job ended

    Succeeded = Row(
        word="Succeeded",
        topic="end",
        event="Normal",
        meaning="The run finished and its model was exported to status.modelURI.",
        remedy="Use the model.",
    )
    StoppedEarly = Row(
        word="StoppedEarly",
        topic="end",
        event="Normal",
        meaning=(
            "Validations no longer improved, so training.earlyStopping ended the run before its last step. Its model"
            " was exported to status.modelURI."
        ),
        remedy="Use the model. To train on, raise training.earlyStopping.patience in a new job with the run directory.",
    )
    AlreadyComplete = Row(
        word="AlreadyComplete",
        topic="end",
        event="Normal",
        meaning=(
            "The run directory already held the finished run of this spec. Nothing was trained; the model is that"
            " run's."
        ),
        remedy="To train again, give the job another run directory.",
    )
    Failed = Row(
        word="Failed",
        topic="end",
        event="Warning",
        meaning="The job ended without a model, or could not push it (`output.hub`); the message says why.",
        remedy="Follow the reason that the message names.",
    )
    RestartsExhausted = Row(
        word="RestartsExhausted",
        topic="end",
        meaning="Retryable failures happened more often than runPolicy.maxRestarts.",
        remedy=(
            "Fix the last failure, which the message names, and retry the job (`dpo retry`): it continues from its"
            " checkpoint."
        ),
    )
    RestartsWithoutProgress = Row(
        word="RestartsWithoutProgress",
        topic="end",
        meaning="Infrastructure failures ended many attempts in a row without a new checkpoint.",
        remedy="Write checkpoints more often (checkpoint.everySteps), or use more reliable nodes.",
    )
    DeadlineExceeded = Row(
        word="DeadlineExceeded",
        topic="end",
        event="Warning",
        retry="permanent",
        ended_by_operator=True,
        meaning="The job was active longer than runPolicy.activeDeadlineSeconds. It wrote a checkpoint.",
        remedy="Set a longer deadline and retry the job (`dpo retry`): it continues from its checkpoint.",
    )

    # -- what the run itself shows

    ScrapeSucceeded = Row(
        word="ScrapeSucceeded",
        topic="invariant",
        meaning="Rank 0 answers GET /status.",
        remedy="Nothing.",
    )
    ScrapeFailed = Row(
        word="ScrapeFailed",
        topic="invariant",
        event="Warning",
        meaning="Rank 0 does not answer GET /status. Training may still be fine; this never causes a restart.",
        remedy="Check that a NetworkPolicy lets the operator reach port 9400 of the trainer's pods.",
    )
    PolicyEqualsReference = Row(
        word="PolicyEqualsReference",
        topic="invariant",
        meaning="The first loss is the one that a policy equal to its reference gives: log-probs and data agree.",
        remedy="Nothing.",
    )
    PolicyDiffersFromReference = Row(
        word="PolicyDiffersFromReference",
        topic="invariant",
        event="Warning",
        meaning=(
            "The first loss is not the one that a policy equal to its reference gives: reference log-probs, data or"
            " model do not match."
        ),
        remedy="Stop the job, delete the reference cache, and report it with the first lines of metrics.jsonl.",
    )
    LossFinite = Row(
        word="LossFinite",
        topic="invariant",
        meaning="All losses so far are finite.",
        remedy="Nothing.",
    )
    LossNotFinite = Row(
        word="LossNotFinite",
        topic="invariant",
        event="Warning",
        meaning="A loss or gradient is NaN or infinite.",
        remedy="Lower training.learningRate; check the data around that step.",
    )
    AboveChance = Row(
        word="AboveChance",
        topic="invariant",
        meaning="Accuracy is above 0.55 and the margin is positive.",
        remedy="Nothing.",
    )
    TooEarly = Row(
        word="TooEarly",
        topic="invariant",
        meaning="There are too few steps to judge.",
        remedy="Wait.",
    )
    AtChance = Row(
        word="AtChance",
        topic="invariant",
        event="Warning",
        meaning="After many steps accuracy is still at most 0.55.",
        remedy=(
            "Check that chosen and rejected are not swapped or alike; raise training.learningRate; lower dpo.beta."
        ),
    )
    MarginNegative = Row(
        word="MarginNegative",
        topic="invariant",
        event="Warning",
        meaning="After many steps rejected responses have a higher reward than chosen ones.",
        remedy="Check that chosen and rejected are not swapped.",
    )
    StepsAdvance = Row(
        word="StepsAdvance",
        topic="invariant",
        meaning="Steps are advancing.",
        remedy="Nothing.",
    )
    NoStep = Row(
        word="NoStep",
        topic="invariant",
        event="Warning",
        meaning="The trainer answers, but neither step nor phase has changed for a long time.",
        remedy="Read rank 0's log. Set runPolicy.stallTimeoutSeconds to restart such attempts automatically.",
    )

    LayoutAgrees = Row(
        word="LayoutAgrees",
        topic="invariant",
        meaning="In this layout, the log-probs and gradients of a few pairs are those of one process.",
        remedy="Nothing.",
    )
    LayoutDiffers = Row(
        word="LayoutDiffers",
        topic="invariant",
        event="Warning",
        meaning="In this layout, log-probs or gradients are not those of one process. Training does not start.",
        remedy="See WrongLayout, for which the attempt has ended.",
    )
    LayoutNotCompared = Row(
        word="LayoutNotCompared",
        topic="invariant",
        meaning="The comparison of the layout with one process would take too long or too much memory.",
        remedy="Nothing, or run the same layout once with a smaller model of the family.",
    )
    RanksKeepPace = Row(
        word="RanksKeepPace",
        topic="invariant",
        meaning="No process is much slower than the others.",
        remedy="Nothing.",
    )
    RankIsSlow = Row(
        word="RankIsSlow",
        topic="invariant",
        event="Warning",
        meaning=(
            "For five steps one process has taken at least 1.5 times as long as the median for its own part of a step,"
            " and the others wait for it. Processes that share a pack look alike."
        ),
        remedy=(
            "Look at the node of the pod that the message names: a GPU that is throttled (`nvidia-smi -q -d"
            " PERFORMANCE`), other work on its CPUs, slow storage."
        ),
    )

    # -- events only

    PyTorchJobCreated = Row(
        word="PyTorchJobCreated",
        topic="event",
        event="Normal",
        meaning="The PyTorchJob of an attempt was created.",
        remedy="Nothing.",
    )
    TrainingStarted = Row(
        word="TrainingStarted",
        topic="event",
        event="Normal",
        meaning="All pods of an attempt are running.",
        remedy="Nothing.",
    )
    ImagesDiffer = Row(
        word="ImagesDiffer",
        topic="event",
        event="Warning",
        meaning="Pods of an attempt, or an attempt and the one before it, run different images: its tag has moved.",
        remedy="Name the image by its digest (spec.image: REPOSITORY@sha256:…), so that every pod runs the same code.",
    )
    CheckpointSaved = Row(
        word="CheckpointSaved",
        topic="event",
        event="Normal",
        meaning="A checkpoint is complete (every tenth is reported).",
        remedy="Nothing.",
    )
    Expired = Row(
        word="Expired",
        topic="event",
        event="Normal",
        meaning=(
            "runPolicy.ttlSecondsAfterFinished or its default has passed and the DPOJob is deleted. The run directory"
            " is kept."
        ),
        remedy="Nothing.",
    )


def named(word: str | None, otherwise: Reason = Reason.Internal) -> Reason:
    """Return the reason of this name; ``otherwise`` for one that this version does not know."""
    return Reason.__members__.get(word or "", otherwise)


def of_outcome(outcome: Outcome) -> Reason:
    """Return the cause that an outcome of the trainer is."""
    return Reason[outcome.name]
