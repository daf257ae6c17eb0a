"""`python -m dpo_trainer`: the trainer's entry point. See `--help`."""

import faulthandler
import signal

from dpo_trainer.entry import main

# Print the stack of each thread on SIGUSR1, to show where a run hangs. Without this, SIGUSR1 ends the process.
faulthandler.register(signal.SIGUSR1)

if __name__ == "__main__":
    # The guard matters: dist_checkpointing.save spawns a process that imports this module again.
    raise SystemExit(main())
