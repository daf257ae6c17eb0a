"""The operator: it runs each DPOJob as a series of PyTorchJobs and reports on it in its status.

``reconcile`` is pure: it maps observations to actions. ``backend`` writes PyTorchJobs and reads them back. ``runtime``
watches the cluster and performs the actions. Nothing here imports torch or the trainer.
"""
