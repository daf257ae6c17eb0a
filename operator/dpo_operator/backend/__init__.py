"""PyTorchJob, the only backend, and the pod that it runs."""
