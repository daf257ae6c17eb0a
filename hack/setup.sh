#!/usr/bin/env bash
# Install the project and what it is developed with into a virtual environment: hack/setup.sh FOLDER EXTRAS
# Versions are those of constraints.txt. uv installs; it comes from the same index, by pip. It takes pip's settings of
# index, links and certificates over, which it would not read itself; where it still fails, pip installs.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$1/bin/python" wanted=(-c constraints.txt -e ".[$2]")
pip=("$python" -m pip --quiet --disable-pip-version-check)

setting() { # NAME -> what pip has for it: its environment, else its files
  "${pip[@]}" config list | sed -n "s/^:env:\.$1='\(.*\)'$/\1/p; s/^[a-z]*\.$1='\(.*\)'$/\1/p" | tail -1
}

take() { # VARIABLE NAME: give uv pip's setting, unless it has its own
  local value
  value="$(setting "$2")"
  if [[ -z "${!1:-}" && -n "$value" ]]; then export "$1=$value"; fi
}

take UV_DEFAULT_INDEX index-url
take UV_INDEX extra-index-url
take UV_FIND_LINKS find-links
take SSL_CERT_FILE cert
"${pip[@]}" install -c constraints.txt --upgrade pip uv
# Bytecode is compiled now, as pip does: else each process that imports torch would compile it again wherever
# PYTHONDONTWRITEBYTECODE is set or the folder is read-only.
if ! "$python" -m uv pip install --quiet --compile-bytecode --python "$python" "${wanted[@]}"; then
  echo "setup: uv did not install it; trying pip" >&2
  "${pip[@]}" install "${wanted[@]}"
fi
