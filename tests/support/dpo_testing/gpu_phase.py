"""`python -m dpo_testing.gpu_phase`: a phase of benchmarks/gpu_check.py, as a module that can be forked."""

import runpy
import sys

from dpo_testing.preloaded import ROOT

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "benchmarks"))
    runpy.run_path(str(ROOT / "benchmarks" / "gpu_check.py"), run_name="__main__")
