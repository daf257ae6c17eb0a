"""The trainer: reads one DPOJob and writes an aligned model. It does not depend on Kubernetes."""
