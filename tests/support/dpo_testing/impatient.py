"""Makes the trainer's own worker wait for others for seconds only, once a file exists.

Until then it is as patient as ever, so that a slow machine ends no run early. As `python -m dpo_testing.impatient
worker …` the file is IMPATIENT in the folder of results.
With SLUGGISH in its environment, that rank sleeps in each forward pass in training. With COUNTING, the FLOPs of a step
are in place of its utilization, which needs a GPU.
"""

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

# isort: split
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from dpo_trainer import waiting
from dpo_trainer.entry import main

SECONDS = 10
IMPATIENT = "impatient"
SLUGGISH = "DPO_TESTING_SLUGGISH"
COUNTING = "DPO_TESTING_COUNTING"
NAP_SECONDS = 0.4


def hurry(flag: Path) -> None:
    """Make this process's ``Watch`` wait SECONDS in a step once the file ``flag`` exists, and very long before."""
    patient = waiting.Watch._limit_here
    waiting.STEP_WAIT_SECONDS = SECONDS

    def limit(self: waiting.Watch) -> float:
        return patient(self) if flag.exists() else waiting.LONGEST_WAIT_SECONDS

    waiting.Watch._limit_here = limit  # type: ignore[method-assign]


if __name__ == "__main__":
    hurry(Path(sys.argv[sys.argv.index("--results") + 1]) / IMPATIENT)
    if os.environ.get(SLUGGISH) == os.environ["RANK"]:
        engine: Any = importlib.import_module("dpo_trainer.engine")
        quick = engine.hidden_rows

        def hidden_rows(model: Any, *rest: Any) -> Any:
            time.sleep(NAP_SECONDS if model.training else 0.0)
            return quick(model, *rest)

        engine.hidden_rows = hidden_rows
    if COUNTING in os.environ:
        training: Any = importlib.import_module("dpo_trainer.training")
        training.utilization = lambda _spec, flops, *_: flops
    sys.exit(main())
