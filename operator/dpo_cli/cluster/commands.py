"""The command lines of `dpo` for clusters. Each command is implemented in its own module."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the DPOJob.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of DPOJobs.")]
Namespace = Annotated[
    str | None, typer.Option("-n", "--namespace", metavar="NAMESPACE", help="Namespace. [the context's]")
]
Context = Annotated[str | None, typer.Option("--context", metavar="CONTEXT", help="Context of the kubeconfig.")]
Kubeconfig = Annotated[
    str | None, typer.Option("--kubeconfig", metavar="FILE", help="Kubeconfig. [$KUBECONFIG, or ~/.kube/config]")
]


class StatusForm(StrEnum):
    """Output formats of `dpo status`."""

    TEXT = "text"
    JSON = "json"
    YAML = "yaml"


def submit(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Manifest files; - for standard input.")],
    follow: Annotated[bool, typer.Option("--follow", help="Show the job until it ends; exit with its code.")] = False,
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="PATH=VALUE", help="Override a spec field: training.maxSteps=10. Repeatable."),
    ] = [],  # noqa: B006 - typer reads the default, never modified
    force_conflicts: Annotated[
        bool, typer.Option("--force-conflicts", help="Take over fields that others manage, as in kubectl apply.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Let the API server check, but store nothing.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Check manifests and apply their DPOJobs on the cluster.

    All errors of a manifest are reported at once, and then nothing is applied.
    """
    from dpo_cli.cluster import submit as command
    from dpo_cli.cluster.kubectl import Kubectl

    options = command.SubmitOptions(tuple(files), tuple(settings), follow, force_conflicts, dry_run)
    raise typer.Exit(command.submit(Kubectl(kubeconfig, context, namespace), options))


def status(
    name: Name,
    output: Annotated[StatusForm, typer.Option("--output", "-o", help="Output format.")] = StatusForm.TEXT,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show a job on the cluster: state, progress, metrics, attempts, and what to do next."""
    from dpo_cli.cluster import status as command
    from dpo_cli.cluster.kubectl import Kubectl

    command.status(Kubectl(kubeconfig, context, namespace), name, output.value)


def logs(
    name: Name,
    rank: Annotated[int, typer.Option(min=0, metavar="R", help="Rank among all processes.")] = 0,
    attempt: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, metavar="N", help="Attempt. [the newest]")
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Wait for more, also of later attempts.")] = False,
    tail: Annotated[int | None, typer.Option(min=0, metavar="LINES", help="Only the last lines. [all]")] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print the log of the pod that runs a rank.

    A pod's log holds the output of all processes of its node.
    """
    from dpo_cli.cluster import logs as command
    from dpo_cli.cluster.kubectl import Kubectl

    options = command.LogOptions(rank, attempt, follow, tail)
    raise typer.Exit(command.logs(Kubectl(kubeconfig, context, namespace), name, options))


def suspend(names: Names, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None) -> None:
    """Let jobs write a checkpoint and release their nodes."""
    from dpo_cli.cluster import change as command
    from dpo_cli.cluster.kubectl import Kubectl

    command.set_suspend(Kubectl(kubeconfig, context, namespace), names, suspend=True)


def resume(names: Names, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None) -> None:
    """Let suspended jobs continue from their newest checkpoints."""
    from dpo_cli.cluster import change as command
    from dpo_cli.cluster.kubectl import Kubectl

    command.set_suspend(Kubectl(kubeconfig, context, namespace), names, suspend=False)


def retry(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job until it ends; exit with its code.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Start a failed job again from its newest checkpoint."""
    from dpo_cli.cluster import change as command
    from dpo_cli.cluster.kubectl import Kubectl

    raise typer.Exit(command.retry(Kubectl(kubeconfig, context, namespace), name, follow_it=follow))


def delete(names: Names, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None) -> None:
    """Delete jobs with their pods. Run directories are kept."""
    from dpo_cli.cluster import change as command
    from dpo_cli.cluster.kubectl import Kubectl

    command.delete(Kubectl(kubeconfig, context, namespace), names)


def top(
    everywhere: Annotated[bool, typer.Option("-A", "--all-namespaces", help="Jobs of all namespaces.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """List jobs with speed, accuracy, margin, GPUs and time left."""
    from dpo_cli.cluster import status as command
    from dpo_cli.cluster.kubectl import Kubectl

    command.top(Kubectl(kubeconfig, context, namespace), everywhere=everywhere)


COMMANDS = (submit, status, logs, suspend, resume, retry, delete, top)
