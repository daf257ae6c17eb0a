"""Saving and resuming: each rank's part of the optimizer's state, as boxes of the whole model's tensors."""
