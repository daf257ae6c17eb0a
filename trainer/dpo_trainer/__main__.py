"""`python -m dpo_trainer`: the trainer's entry point. See `--help`."""

import faulthandler
import signal

from dpo_trainer.entry import main

# Prints the stack of each thread, of a run that hangs for instance, and goes on. Without it SIGUSR1 kills.
faulthandler.register(signal.SIGUSR1)

if __name__ == "__main__":
    # The guard matters: dist_checkpointing.save spawns a process that imports this module again.
    raise SystemExit(main())
