"""The contract of dpo-operator: the DPOJob's spec and status, read by the operator, the CLI and the trainer alike."""
