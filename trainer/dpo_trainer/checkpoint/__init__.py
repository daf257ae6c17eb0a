"""Saving and resuming through Megatron-Core's dist_checkpointing."""
