#!/usr/bin/env bash
# Rewrites constraints.txt: exact versions of everything that `make setup` may install, and hack/image/hashes.txt: the
# part of it that images install, with the SHA-256 of every file. Neither holds an address.
# uv resolves them: pip takes minutes for a set of this size.
set -euo pipefail
cd "$(dirname "$0")/.."
printf 'torch==2.13.0\nmegatron-core==0.19.2\nkopf==1.45.2\n' > build/pins.txt
if [[ ${1:-} != --hashes ]]; then # --hashes: for the versions that are there
  {
    echo "# Exact versions for a reproducible set-up: pip install -c constraints.txt. Rewritten by \`make lock\`."
    uv pip compile --no-header --no-annotate -q --python-version 3.12 --extra operator --extra trainer --extra wandb \
      --extra mlflow --extra quickstart --extra dev -c build/pins.txt pyproject.toml
  } > build/constraints.txt
  mv build/constraints.txt constraints.txt # only now: a failed resolution leaves the old one
fi
sed -n 's/^requires = \["\(.*\)"\]$/\1/p' pyproject.toml > build/build-system.in # what building our own wheel takes
{
  echo "# What the images install, with the SHA-256 of every file of each version. Rewritten by \`make lock\`."
  uv pip compile --no-header --generate-hashes -q --python-version 3.12 --extra operator --extra trainer --extra wandb \
    --extra mlflow -c constraints.txt pyproject.toml build/build-system.in
} > build/hashes.txt
mv build/hashes.txt hack/image/hashes.txt
