"""`python -m dpo_trainer`: the trainer's entry point. See `--help`."""

from dpo_trainer.entry import main

if __name__ == "__main__":
    # The guard matters: dist_checkpointing.save spawns a process that imports this module again.
    raise SystemExit(main())
