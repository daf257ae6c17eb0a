"""The phases of gpu_check.py: each is a module with ``run(report, small)``, and ends with figures and checks."""
