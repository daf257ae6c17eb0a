#!/usr/bin/env bash
# Rewrites constraints.txt: exact versions of everything that `make setup` may install, without any address.
# uv resolves them: pip takes minutes for a set of this size.
set -euo pipefail
cd "$(dirname "$0")/.."
printf 'torch==2.13.0\nmegatron-core==0.19.2\nkopf==1.45.2\n' > build/pins.txt
{
  echo "# Exact versions for a reproducible set-up: pip install -c constraints.txt. Rewritten by \`make lock\`."
  uv pip compile --no-header --no-annotate -q --python-version 3.12 --extra operator --extra trainer --extra wandb \
    --extra quickstart --extra dev -c build/pins.txt pyproject.toml
} > build/constraints.txt
mv build/constraints.txt constraints.txt # only now: a failed resolution leaves the old one
