"""The commands of `dpo` and their options. Each command is implemented in its own module."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from dpo_api.errors import DPOError
from dpo_cli.cluster.commands import COMMANDS

app = typer.Typer(
    name="dpo",
    help="Fine-tune language models on preference data with DPO, on this machine or on a Kubernetes cluster.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class OutputForm(StrEnum):
    """Output formats of `dpo validate`."""

    TEXT = "text"
    JSON = "json"


class ModelFormat(StrEnum):
    """Formats that `dpo convert` writes."""

    HUGGINGFACE = "huggingface"
    MEGATRON = "megatron"
    NEMO = "nemo"


class WeightType(StrEnum):
    """Types of weights that `dpo convert` writes."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Shell(StrEnum):
    """Shells that have a completion script."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


Set = Annotated[
    list[str],
    typer.Option("--set", metavar="PATH=VALUE", help="Override a spec field: training.maxSteps=10. Repeatable."),
]


@app.command()
def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Manifest files; - for standard input.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read all data; count pairs exactly.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Check the manifest only.")] = False,
    cluster: Annotated[bool, typer.Option("--cluster", help="Also check what only a cluster needs.")] = False,
    settings: Set = [],  # noqa: B006 - typer reads the default, never modified
    output: Annotated[OutputForm, typer.Option("--output", "-o", help="Output format.")] = OutputForm.TEXT,
) -> None:
    """Check manifests and print the effective settings.

    All errors of a manifest are reported at once, each with its field, its line and a fix.
    """
    from dpo_cli import validate as command
    from dpo_cli.console import stdout

    if deep and offline:
        from dpo_api.errors import UsageError

        raise UsageError("--deep reads the data and --offline does not; use one of them")
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
    manifest: Annotated[str | None, typer.Argument(metavar="FILE", help="Manifest file; the same as -f FILE.")] = None,
    file: Annotated[
        str | None, typer.Option("-f", "--file", metavar="FILE", help="Manifest file; - for standard input.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="DIR", help="Run directory. [checkpoint.uri, or runs/NAME]"),
    ] = None,
    settings: Set = [],  # noqa: B006 - typer reads the default, never modified
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=256,
            metavar="N",
            help="Training processes. [one per GPU; on CPU processesPerNode, or 1]",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, metavar="PORT", help="Serve /metrics, /status and /healthz here."),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address that --port listens on.")] = "127.0.0.1",
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the DPOJob, if the file holds several.")
    ] = None,
) -> None:
    """Run a job on this machine.

    The manifest is the same as on a cluster. Run the same command again to continue a stopped run from its newest
    checkpoint.
    """
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
    run_dir: Annotated[str, typer.Argument(metavar="DIR", help="Run directory: a folder or s3://bucket/prefix.")],
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="S3 endpoint. [$AWS_ENDPOINT_URL]")] = None,
    region: Annotated[str | None, typer.Option(metavar="REGION", help="S3 region. [$AWS_REGION]")] = None,
) -> None:
    """Write report.html of a run directory again."""
    from dpo_cli.report import redraw
    from dpo_cli.stores import PATIENCE
    from dpo_store import StorageOptions, open_store

    store = open_store(StorageOptions(endpoint=endpoint, region=region), retry=PATIENCE)
    typer.echo(redraw(store, run_dir).uri)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The model: a folder or a .nemo file.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="What to write: a folder, or a .nemo file.")],
    adapter: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="A LoRA adapter of SOURCE (PEFT), to merge into it.")
    ] = None,
    to: Annotated[
        ModelFormat | None, typer.Option(help="Format of TARGET. [nemo for *.nemo, else huggingface]")
    ] = None,
    dtype: Annotated[WeightType | None, typer.Option(help="Type of the written weights. [the source's]")] = None,
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="S3 endpoint. [$AWS_ENDPOINT_URL]")] = None,
    region: Annotated[str | None, typer.Option(metavar="REGION", help="S3 region. [$AWS_REGION]")] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not compare the result with SOURCE at the end.")
    ] = False,
) -> None:
    """Write a model in another format.

    Run the same command again to continue a stopped conversion. Both may be s3://bucket/prefix.
    """
    from dpo_cli import convert as command

    options = command.ConvertOptions(source, target, adapter, to, dtype, endpoint, region, not no_check)
    raise typer.Exit(command.convert(options))


@app.command()
def render(
    file: Annotated[str, typer.Option("-f", "--file", metavar="FILE", help="Manifest file; - for standard input.")],
    settings: Set = [],  # noqa: B006 - typer reads the default, never modified
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Trainer image for jobs without spec.image.")
    ] = None,
    attempt: Annotated[int, typer.Option(min=1, max=999_999, metavar="N", help="Attempt number.")] = 1,
) -> None:
    """Print the objects that the operator would create.

    No cluster is needed.
    """
    from dpo_cli.render import print_rendered

    print_rendered(file, settings, image=image, attempt=attempt)


for _command in COMMANDS:
    app.command()(_command)


@app.command()
def completion(shell: Annotated[Shell, typer.Argument(help="bash, zsh or fish.")]) -> None:
    """Print a shell completion script.

    Load it with `source <(dpo completion bash)`.
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    typer.echo(get_completion_script(prog_name="dpo", complete_var="_DPO_COMPLETE", shell=shell.value))


@app.command()
def version() -> None:
    """Print the versions of the client and of the API."""
    from dpo_api.manifest import API_VERSION
    from dpo_api.version import VERSION

    typer.echo(f"dpo {VERSION} (API {API_VERSION})")
