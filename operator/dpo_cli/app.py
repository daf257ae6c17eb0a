"""The commands of `dpo` and their options. What they do lives in a module each."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from dpo_api.errors import DPOError

app = typer.Typer(
    name="dpo",
    help="Align language models with preference data: one manifest, on this machine or on a cluster.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class OutputForm(StrEnum):
    """How a verdict is printed."""

    TEXT = "text"
    JSON = "json"


class Shell(StrEnum):
    """Shells with completion."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


Set = Annotated[
    list[str],
    typer.Option("--set", metavar="PATH=VALUE", help="Lay a value over the spec: training.maxSteps=10. Repeatable."),
]


@app.command()
def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Manifests; - reads standard input.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read all data: exact pairs and steps, every bad line.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Do not look for data, model and buckets.")] = False,
    cluster: Annotated[bool, typer.Option("--cluster", help="Also check what only a cluster needs.")] = False,
    settings: Set = [],  # noqa: B006 - typer reads the default, nobody changes it
    output: Annotated[OutputForm, typer.Option("--output", "-o", help="Form of the answer.")] = OutputForm.TEXT,
) -> None:
    """Report every mistake of a manifest at once, and what it amounts to."""
    from dpo_cli import validate as command
    from dpo_cli.console import stdout

    if deep and offline:
        from dpo_api.errors import UsageError

        raise UsageError("--deep reads the data and --offline forbids it; leave one out")
    options = command.Options(deep=deep, offline=offline, cluster=cluster)
    verdicts: list[command.Verdict] = []
    for file in files:
        try:
            verdicts += command.validate_file(file, settings, options)
        except DPOError as error:
            if len(files) == 1:
                raise
            verdicts.append(command.problem_of(file, error))
    if output is OutputForm.JSON:
        typer.echo(command.as_json(verdicts))
    else:
        console = stdout()
        for verdict in verdicts:
            command.print_text(console, verdict)
    raise typer.Exit(command.worst(verdicts).exit_code)


@app.command()
def run(
    manifest: Annotated[str | None, typer.Argument(metavar="FILE", help="Manifest, as with -f.")] = None,
    file: Annotated[
        str | None, typer.Option("-f", "--file", metavar="FILE", help="Manifest; - reads standard input.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", help="Run directory. [checkpoint.uri, or runs/NAME]")
    ] = None,
    settings: Set = [],  # noqa: B006 - typer reads the default, nobody changes it
    processes: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Training processes. [one a GPU; resources.processesPerNode, or 1]"),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Serve /metrics, /status and /healthz here. [not served]")
    ] = None,
    host: Annotated[str, typer.Option(help="Address that the port listens on.")] = "127.0.0.1",
    name: Annotated[str | None, typer.Option(help="Which DPOJob, when the file holds several.")] = None,
) -> None:
    """Train on this machine, by the same manifest as on a cluster. The same command continues a stopped run."""
    from dpo_cli import run as command

    if (manifest is None) is (file is None):
        from dpo_api.errors import UsageError

        raise UsageError(
            "Missing option '-f': dpo run -f FILE" if file is None else f"two manifests: {file}, {manifest}"
        )
    options = command.RunOptions(file or manifest or "", output, tuple(settings), processes, port, host, name)
    raise typer.Exit(command.run(options))


@app.command()
def report(
    run_dir: Annotated[str, typer.Argument(metavar="DIR", help="A run directory: a folder or s3://bucket/prefix.")],
    endpoint: Annotated[str | None, typer.Option(help="S3 endpoint. [AWS_ENDPOINT_URL]")] = None,
    region: Annotated[str | None, typer.Option(help="S3 region. [AWS_REGION]")] = None,
) -> None:
    """Draw report.html of a run directory again."""
    from dpo_cli.report import redraw
    from dpo_cli.stores import PATIENCE
    from dpo_store import StorageOptions, open_store

    store = open_store(StorageOptions(endpoint=endpoint, region=region), retry=PATIENCE)
    typer.echo(redraw(store, run_dir).uri)


@app.command()
def render(
    file: Annotated[str, typer.Option("-f", "--file", metavar="FILE", help="Manifest; - reads standard input.")],
    settings: Set = [],  # noqa: B006 - typer reads the default, nobody changes it
    image: Annotated[str | None, typer.Option(help="The operator's trainer image, for jobs that name none.")] = None,
    attempt: Annotated[int, typer.Option(min=1, max=999_999, help="Number of the attempt.")] = 1,
) -> None:
    """Print the objects that the operator would create on a cluster, offline."""
    from dpo_cli.render import print_rendered

    print_rendered(file, settings, image=image, attempt=attempt)


@app.command()
def completion(shell: Annotated[Shell, typer.Argument(help="bash, zsh or fish.")]) -> None:
    """Print a completion script: `source <(dpo completion bash)`."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    typer.echo(get_completion_script(prog_name="dpo", complete_var="_DPO_COMPLETE", shell=shell.value))


@app.command()
def version() -> None:
    """Print the versions of the client and of its API."""
    from dpo_api.manifest import API_VERSION
    from dpo_api.version import VERSION

    typer.echo(f"dpo {VERSION} (API {API_VERSION})")
