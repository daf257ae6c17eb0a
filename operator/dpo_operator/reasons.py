"""Every reason that a status or an event can name: what it means, what to do. docs/operations.md prints the table."""

from __future__ import annotations

from enum import Enum
from typing import Literal

from dpo_api.errors import Outcome, Retry

Topic = Literal["acceptance", "progress", "cause", "end", "invariant", "event"]

TOPICS: dict[Topic, str] = {
    "acceptance": "Whether a job may run",
    "progress": "Where a job is",
    "cause": "Why an attempt ended",
    "end": "Why a job ended",
    "invariant": "What the run itself shows",
    "event": "Events alone",
}


class Reason(Enum):
    """One word for machines. The member's name and value are the word."""

    topic: Topic
    meaning: str
    remedy: str
    retry: Retry
    """Of causes: whether another attempt could help."""

    def __new__(cls, name: str, topic: Topic, meaning: str, remedy: str, retry: Retry = "none") -> Reason:  # noqa: PYI034
        """Make the member whose value is ``name``."""
        member = object.__new__(cls)
        member._value_ = name
        member.topic, member.meaning, member.remedy, member.retry = topic, meaning, remedy, retry
        return member

    Accepted = (
        "Accepted",
        "acceptance",
        "The spec is possible; image and spec are fixed in the job's ConfigMap.",
        "Nothing. The message lists what is doubtful.",
    )
    Rejected = (
        "Rejected",
        "acceptance",
        "The spec cannot run; the message names field, value and fix, all at once.",
        "Delete the job, correct the manifest, apply it again. `dpo validate --cluster FILE` says the same beforehand.",
    )
    ChildInvalid = (
        "ChildInvalid",
        "acceptance",
        "The API server would refuse the PyTorchJob: a field inside podTemplate is wrong, in the server's own words.",
        "Correct the field of podTemplate that the message names and create the job again.",
    )
    SpecUnreadable = (
        "SpecUnreadable",
        "acceptance",
        "The job was accepted, and this operator cannot read its spec: it is older than the one that accepted it.",
        "Upgrade the operator. The running attempt is left alone.",
    )
    PyTorchJobMissing = (
        "PyTorchJobMissing",
        "progress",
        "The cluster has no PyTorchJob kind, so nothing can be started.",
        "Install training-operator v1 (v1.9.4). Jobs go on by themselves.",
    )
    ChildRefused = (
        "ChildRefused",
        "progress",
        "The API server refused to create an object: a quota, an admission policy or missing rights, in its own words.",
        "Raise the quota or change the policy. The operator tries again every minute.",
    )
    ChildNameTaken = (
        "ChildNameTaken",
        "progress",
        "An object with the name of the next PyTorchJob or ConfigMap exists and belongs to somebody else.",
        "Rename or delete that object, or create the job under another name.",
    )
    WaitingForNamesake = (
        "WaitingForNamesake",
        "progress",
        "A deleted DPOJob of the same name still has a PyTorchJob or pods that are ending.",
        "Wait. If a pod hangs on a dead node, delete the node or the pod by force.",
    )
    Queued = (
        "Queued",
        "progress",
        "Kueue holds the PyTorchJob back until its queue has room. A restart queues again.",
        "`kubectl get workloads` shows the place in the queue. Queued time counts against no limit.",
    )
    Starting = (
        "Starting",
        "progress",
        "Pods are being created, scheduled, or pull their image.",
        "Wait; after runPolicy.startTimeoutSeconds the attempt is ended and retried.",
    )
    Unschedulable = (
        "Unschedulable",
        "progress",
        "No node has room for a pod; the message is the scheduler's.",
        "Free or add nodes, or ask for less in spec.resources.",
    )
    ImagePullFailed = (
        "ImagePullFailed",
        "progress",
        "A node cannot pull the trainer's image; the message is the kubelet's.",
        "Check spec.image (or the operator's image) and podTemplate.imagePullSecrets.",
    )
    ContainerConfigError = (
        "ContainerConfigError",
        "progress",
        "A container cannot be set up: a Secret, ConfigMap or key is missing, or the image would run as root.",
        "Create what the message names; it is taken up without a restart.",
    )
    VolumeNotMounted = (
        "VolumeNotMounted",
        "progress",
        "A volume cannot be mounted: a claim, Secret or ConfigMap is missing or in use elsewhere.",
        "Create what the message names, or make the claim ReadWriteMany.",
    )
    PodsRefused = (
        "PodsRefused",
        "progress",
        "training-operator may not create the pods: a quota, Pod Security or a webhook, in its own words.",
        "Raise the quota or change the policy; for Pod Security see what the message names.",
    )
    InitContainerRefused = (
        "InitContainerRefused",
        "progress",
        "The init container that training-operator puts before every worker is refused or cannot be pulled.",
        (
            "Set training-operator's flag --pytorch-init-container-image to an image that the nodes can pull, and its"
            " template /etc/config/initContainer.yaml to one with a restricted securityContext."
        ),
    )
    Running = (
        "Running",
        "progress",
        "All pods run; the message says which phase and step.",
        "Nothing.",
    )
    Checkpointing = (
        "Checkpointing",
        "progress",
        "The pods were asked to stop and write a checkpoint, for at most checkpoint.gracePeriodSeconds.",
        "Wait.",
    )
    Restarting = (
        "Restarting",
        "progress",
        "An attempt has ended and the next one follows, after a pause that grows with failures in a row.",
        "Read the attempt's cause in status.attempts.",
    )
    Suspended = (
        "Suspended",
        "progress",
        "runPolicy.suspend is true: the attempt wrote a checkpoint and gave its nodes back.",
        "Set runPolicy.suspend to false to go on from the checkpoint. It is charged to no budget.",
    )
    Resumed = (
        "Resumed",
        "progress",
        "runPolicy.suspend was true and is false again.",
        "Nothing.",
    )
    MemoryLimitExceeded = (
        "MemoryLimitExceeded",
        "cause",
        "The trainer's container used more memory than its limit (spec.resources.memory, or the namespace's default).",
        "Raise spec.resources.memory, or lower data.maxLength or training.packing.maxTokens.",
        "permanent",
    )
    ScratchLimitExceeded = (
        "ScratchLimitExceeded",
        "cause",
        "The pod wrote more than its scratch volume or /dev/shm may hold and was evicted.",
        "Raise spec.resources.scratch or shm, or put the cache on a claim (storage.cache.claim).",
        "permanent",
    )
    NodeOutOfMemory = (
        "NodeOutOfMemory",
        "cause",
        "The node ran out of memory, and no limit of the job's own was in the way.",
        "Set spec.resources.memory, so that the scheduler keeps that much free.",
        "infrastructure",
    )
    NodeLost = (
        "NodeLost",
        "cause",
        "A node stopped answering, was removed, or lost its containers in a reboot.",
        "Nothing; the next attempt prefers other nodes.",
        "infrastructure",
    )
    Evicted = (
        "Evicted",
        "cause",
        "A kubelet evicted the pod because its node ran short of something.",
        "Look at the node's conditions (memory, disk, processes).",
        "infrastructure",
    )
    Preempted = (
        "Preempted",
        "cause",
        "The scheduler gave the node to a pod of higher priority.",
        "Nothing; or give the job a priorityClassName.",
        "infrastructure",
    )
    Drained = (
        "Drained",
        "cause",
        "The pod was evicted through the API, as `kubectl drain` does.",
        "Nothing; the next attempt prefers other nodes.",
        "infrastructure",
    )
    NodeShutdown = (
        "NodeShutdown",
        "cause",
        "The node was shut down in order.",
        "Nothing; the next attempt prefers other nodes.",
        "infrastructure",
    )
    AdmissionFailed = (
        "AdmissionFailed",
        "cause",
        "A kubelet refused a pod that the scheduler had sent it, such as one whose GPU had just failed.",
        "Look at the node's devices when it happens on the same node again.",
        "infrastructure",
    )
    PodDeleted = (
        "PodDeleted",
        "cause",
        "Somebody deleted a running pod.",
        "Nothing. To stop a job set runPolicy.suspend.",
        "infrastructure",
    )
    PodVanished = (
        "PodVanished",
        "cause",
        "A pod is gone and nobody saw how it ended.",
        "Nothing; look at the cluster's events when it happens often.",
        "infrastructure",
    )
    ChildDeleted = (
        "ChildDeleted",
        "cause",
        "Somebody deleted the attempt's PyTorchJob.",
        "Nothing. To stop a job set runPolicy.suspend.",
        "infrastructure",
    )
    ContainerStartFailed = (
        "ContainerStartFailed",
        "cause",
        "The container could not be started, such as when the image has no Python or a device is broken.",
        "Check spec.image; look at the node that the message names.",
        "retryable",
    )
    InitContainerFailed = (
        "InitContainerFailed",
        "cause",
        "training-operator's init container did not find the master's name in the cluster's DNS.",
        "Check the cluster's DNS; see InitContainerRefused for a container that fits your cluster.",
        "retryable",
    )
    Killed = (
        "Killed",
        "cause",
        "The trainer was ended by a signal, and nobody said why.",
        "Look at the pod's log (`kubectl logs`) and at the node's kernel log.",
        "retryable",
    )
    FinalWordsLost = (
        "FinalWordsLost",
        "cause",
        "Kubernetes calls the attempt succeeded, but rank 0's last words, which prove the export, are not there.",
        "Nothing: the next attempt asks the run directory and ends at once when the model is there.",
        "retryable",
    )
    StartTimeout = (
        "StartTimeout",
        "cause",
        "Not every pod ran within runPolicy.startTimeoutSeconds of admission; the message has the pod's own words.",
        "Mend what the message names; the next attempt prefers other nodes. No GPU is held meanwhile.",
        "retryable",
    )
    Stalled = (
        "Stalled",
        "cause",
        "No step within runPolicy.stallTimeoutSeconds while the trainer answered; the attempt was ended.",
        "Read the log of the attempt; for NCCL, the record of its last collectives.",
        "retryable",
    )
    Internal = ("Internal", "cause", Outcome.Internal.description, "Read the log and report it.", "retryable")
    InvalidSpec = (
        "InvalidSpec",
        "cause",
        Outcome.InvalidSpec.description,
        "Correct the field that the message names and create the job again.",
        "permanent",
    )
    InvalidData = (
        "InvalidData",
        "cause",
        Outcome.InvalidData.description,
        "Correct the lines that the message names, or set data.onInvalid: skip.",
        "permanent",
    )
    InvalidModel = (
        "InvalidModel",
        "cause",
        Outcome.InvalidModel.description,
        "Upload the model again, or start from another one.",
        "permanent",
    )
    NonFinite = (
        "NonFinite",
        "cause",
        Outcome.NonFinite.description,
        "Lower training.learningRate; look at the data around the step that the message names.",
        "permanent",
    )
    OutOfMemory = (
        "OutOfMemory",
        "cause",
        Outcome.OutOfMemory.description,
        "Lower training.packing.maxTokens or data.maxLength, use lora, or more GPUs.",
        "permanent",
    )
    NoSpace = ("NoSpace", "cause", Outcome.NoSpace.description, "Free or enlarge what the message names.", "permanent")
    IncompatibleCheckpoint = (
        "IncompatibleCheckpoint",
        "cause",
        Outcome.IncompatibleCheckpoint.description,
        "Give the job a run directory of its own (checkpoint.uri).",
        "permanent",
    )
    Fenced = (
        "Fenced",
        "cause",
        Outcome.Fenced.description,
        "Two jobs share a run directory: give each its own (checkpoint.uri).",
        "permanent",
    )
    AccessDenied = (
        "AccessDenied",
        "cause",
        Outcome.AccessDenied.description,
        "Check storage.credentialsSecretRef or the service account's role.",
        "permanent",
    )
    NotFound = (
        "NotFound",
        "cause",
        Outcome.NotFound.description,
        "Check the address that the message names.",
        "permanent",
    )
    PortInUse = (
        "PortInUse",
        "cause",
        Outcome.PortInUse.description,
        "Remove the sidecar that takes port 9400 or 23456.",
        "permanent",
    )
    Usage = (
        "Usage",
        "cause",
        Outcome.Usage.description,
        "The image is older than the operator: use one of the same version.",
        "permanent",
    )
    StorageUnavailable = (
        "StorageUnavailable",
        "cause",
        Outcome.StorageUnavailable.description,
        "Look at the S3 service; raise runPolicy.maxRestarts for a long outage.",
        "retryable",
    )
    Communication = (
        "Communication",
        "cause",
        Outcome.Communication.description,
        "Once: nothing. Often: check the network between nodes, NCCL's settings and the GPUs.",
        "retryable",
    )
    Stopped = (
        "Stopped",
        "cause",
        Outcome.Stopped.description,
        "Nothing; the next attempt goes on from there.",
        "infrastructure",
    )
    Succeeded = (
        "Succeeded",
        "end",
        "The run finished and its model was exported; status.modelURI says where.",
        "Use the model.",
    )
    AlreadyComplete = (
        "AlreadyComplete",
        "end",
        "The run directory held the finished run of the same spec, so nothing was trained: the model is that run's.",
        "Give the job another run directory to train again.",
    )
    Failed = (
        "Failed",
        "end",
        "The job ended without a model; the message says why.",
        "Follow the cause named in the message.",
    )
    RestartsExhausted = (
        "RestartsExhausted",
        "end",
        "Failures that might have passed happened more often than runPolicy.maxRestarts.",
        "Mend the last cause, which the message names, and create the job again: it goes on from its checkpoint.",
    )
    RestartsWithoutProgress = (
        "RestartsWithoutProgress",
        "end",
        "Nodes failed the job many times in a row without a new checkpoint between.",
        "Write checkpoints more often (checkpoint.everySteps), or use steadier nodes.",
    )
    DeadlineExceeded = (
        "DeadlineExceeded",
        "end",
        "The job was admitted for longer than runPolicy.activeDeadlineSeconds. It wrote a checkpoint.",
        "Create the job again with a longer deadline: it goes on from its checkpoint.",
    )
    ScrapeSucceeded = (
        "ScrapeSucceeded",
        "invariant",
        "Rank 0 answers GET /status.",
        "Nothing.",
    )
    ScrapeFailed = (
        "ScrapeFailed",
        "invariant",
        "Rank 0 does not answer GET /status; training itself may be well. It is never a reason for a restart.",
        "Check that a NetworkPolicy lets the operator reach port 9400 of the trainer's pods.",
    )
    PolicyEqualsReference = (
        "PolicyEqualsReference",
        "invariant",
        "The first loss is what equal policy and reference give, so that log-probs and data agree.",
        "Nothing.",
    )
    PolicyDiffersFromReference = (
        "PolicyDiffersFromReference",
        "invariant",
        "The first loss is not what equal policy and reference give: reference log-probs, data or model do not match.",
        "Stop the job; delete the reference cache; report it with the first lines of metrics.jsonl.",
    )
    LossFinite = ("LossFinite", "invariant", "The losses seen so far are finite.", "Nothing.")
    LossNotFinite = (
        "LossNotFinite",
        "invariant",
        "A loss or gradient is NaN or infinite.",
        "Lower training.learningRate; look at the data around that step.",
    )
    AboveChance = ("AboveChance", "invariant", "Accuracy is above 0.55 and the margin is positive.", "Nothing.")
    TooEarly = ("TooEarly", "invariant", "Too few steps to judge.", "Wait.")
    AtChance = (
        "AtChance",
        "invariant",
        "After many steps accuracy is still at most 0.55.",
        "Check that chosen and rejected are not swapped or alike; raise training.learningRate; lower dpo.beta.",
    )
    MarginNegative = (
        "MarginNegative",
        "invariant",
        "After many steps rejected responses are rewarded more than chosen ones.",
        "Check that chosen and rejected are not swapped.",
    )
    StepsAdvance = ("StepsAdvance", "invariant", "Steps follow each other.", "Nothing.")
    NoStep = (
        "NoStep",
        "invariant",
        "The trainer answers, but neither step nor phase has changed for long.",
        "Read rank 0's log; set runPolicy.stallTimeoutSeconds to have such attempts restarted.",
    )
    PyTorchJobCreated = ("PyTorchJobCreated", "event", "An attempt's PyTorchJob was created.", "Nothing.")
    TrainingStarted = ("TrainingStarted", "event", "All pods of an attempt run.", "Nothing.")
    CheckpointSaved = ("CheckpointSaved", "event", "A checkpoint is complete (told for every tenth).", "Nothing.")
    Expired = (
        "Expired",
        "event",
        "runPolicy.ttlSecondsAfterFinished has passed and the DPOJob is deleted; the run directory stays.",
        "Nothing.",
    )


def named(word: str | None, otherwise: Reason = Reason.Internal) -> Reason:
    """Return the reason of this name; ``otherwise`` for one that this version does not know."""
    return next((reason for reason in Reason if reason.value == word), otherwise)


def of_outcome(outcome: Outcome) -> Reason:
    """Return the cause that an outcome of the trainer is."""
    return Reason[outcome.name]
