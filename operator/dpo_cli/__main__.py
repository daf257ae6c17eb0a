"""`dpo`, also as `python -m dpo_cli`: runs one command and turns its result or its error into an exit code."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

from dpo_api.errors import DPOError, Outcome
from dpo_api.findings import ManifestError
from dpo_cli.cluster.errors import ClusterError, program

INTERRUPTED = 130
"""Exit code after Ctrl-C outside a run: what a shell reports for SIGINT."""
PIPE_CLOSED = 141
"""Exit code when the reader of our output has exited (`dpo validate … | head`): what a shell reports for SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit. Only an unexpected error produces a traceback, which goes to a file."""
    code = run(sys.argv[1:] if argv is None else list(argv))
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    from dpo_cli.app import app

    try:
        # Not standalone: typer's exit codes for usage errors would collide with ours.
        code = app(args=list(argv) or ["--help"], prog_name=program(), standalone_mode=False)
    except (DPOError, ClusterError) as error:
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads stdout any more; without this, flushing it at exit would fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:  # noqa: BLE001 - the last resort
        from dpo_cli.console import print_error, stderr

        outcome, message = _unexpected(error, argv)
        print_error(stderr(), outcome, message)
        return outcome.exit_code
    return code if isinstance(code, int) else 0


def _report(error: DPOError | ClusterError) -> None:
    """Print a failure that a user can do something about. Those of the cluster are printed as kubectl has them."""
    from dpo_cli.console import print_error, print_findings, stderr

    if isinstance(error, ManifestError):
        print_findings(stderr(), error.findings)
    elif isinstance(error, DPOError):
        print_error(stderr(), error.outcome, str(error))
    else:
        sys.stderr.write(f"{error}\n")


def _unexpected(error: Exception, argv: Sequence[str]) -> tuple[Outcome, str]:
    """Distinguish a mistake in the command line, for which typer has its own exceptions, from a bug of ours."""
    format_message = getattr(error, "format_message", None)
    if callable(format_message):
        return Outcome.Usage, f"{format_message()} (dpo --help)"
    return Outcome.Internal, f"{type(error).__name__}: {error}; details are in {_note(argv)}"


def _note(argv: Sequence[str]) -> str:
    """Write the traceback to a file and return its name."""
    handle, path = tempfile.mkstemp(prefix="dpo-error-", suffix=".log", text=True)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(f"dpo {' '.join(argv)}\n\n{traceback.format_exc()}")
    return path


if __name__ == "__main__":
    main()
