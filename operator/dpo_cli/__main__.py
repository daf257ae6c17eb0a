"""`dpo`, also as `python -m dpo_cli`: runs one command and turns whatever happens into an exit code."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

from dpo_api.errors import DPOError, Outcome
from dpo_api.findings import ManifestError

INTERRUPTED = 130
"""Exit code after Ctrl-C outside of a run: a shell's own for SIGINT."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit. Only errors that nobody foresaw leave a traceback, and that in a file."""
    code = run(sys.argv[1:] if argv is None else list(argv))
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    from dpo_cli.app import app
    from dpo_cli.console import print_error, print_findings, stderr

    try:
        # Not standalone: the library's own exit codes for usage would collide with ours.
        result = app(args=list(argv) or ["--help"], prog_name="dpo", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except ManifestError as error:
        print_findings(stderr(), error.findings)
        return error.exit_code
    except DPOError as error:
        print_error(stderr(), error.outcome, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`dpo validate … | head`): nothing is left to say, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:  # noqa: BLE001 - the last resort
        outcome, message = _unforeseen(error, argv)
        print_error(stderr(), outcome, message)
        return outcome.exit_code
    return 0


def _unforeseen(error: Exception, argv: Sequence[str]) -> tuple[Outcome, str]:
    """Tell a mistake in the command line, which typer reports by exceptions of its own, from a bug of ours."""
    told = getattr(error, "format_message", None)
    if callable(told):
        return Outcome.Usage, f"{told()} (dpo --help)"
    return Outcome.Internal, f"{type(error).__name__}: {error}; details are in {_note(argv)}"


def _note(argv: Sequence[str]) -> str:
    """Write the traceback to a file and return its name."""
    handle, path = tempfile.mkstemp(prefix="dpo-error-", suffix=".log", text=True)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(f"dpo {' '.join(argv)}\n\n{traceback.format_exc()}")
    return path


if __name__ == "__main__":
    main()
