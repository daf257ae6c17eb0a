"""The operator: DPOJobs in, PyTorchJobs out, and the truth about them in their status.

``reconcile`` is pure: it looks at what was observed and says what to do. ``backend`` holds all knowledge about the
child's kind. ``process`` watches the cluster and performs what was decided. Nothing here imports torch or the trainer.
"""
