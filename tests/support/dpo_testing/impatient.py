"""`python -m dpo_testing.impatient worker …`: the trainer's own worker, which waits for others for seconds only.

Until the file IMPATIENT is in the folder of results it is as patient as ever, so that a slow machine ends no run early.
"""

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

# isort: split
import sys
from pathlib import Path

from dpo_trainer import waiting
from dpo_trainer.entry import main

SECONDS = 10
IMPATIENT = "impatient"

if __name__ == "__main__":
    results = Path(sys.argv[sys.argv.index("--results") + 1])
    patient = waiting.Watch._limit_here
    waiting.STEP_WAIT_SECONDS = SECONDS

    def limit(self: waiting.Watch) -> float:
        return patient(self) if (results / IMPATIENT).exists() else waiting.LONGEST_WAIT_SECONDS

    waiting.Watch._limit_here = limit  # type: ignore[method-assign]
    sys.exit(main())
