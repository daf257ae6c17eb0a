"""The API of dpo-operator: the DPOJob's spec and status, which the operator, the CLI and the trainer share."""
