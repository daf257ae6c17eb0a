"""The trainer: it reads one DPOJob and writes an aligned model. It knows no Kubernetes."""
