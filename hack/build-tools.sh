#!/usr/bin/env bash
# Build the Go programs that the tests run, each pinned by hack/tools/<name>/{go.mod,go.sum}.
#
#   hack/build-tools.sh [NAME...]          build the named tools (by default all but the marked ones); print their paths
#   hack/build-tools.sh --only MARK        build the tools marked `// MARK`: those of e2e need not wait in `make test`
#   hack/build-tools.sh --path NAME        print where NAME's binary lies once built; build nothing
#
# A folder holds go.mod, go.sum and tools.go. Each line of tools.go that reads `import _ "PACKAGE"` is a program: it is
# named after the folder, or, where the folder pins several (kubernetes) or holds the program itself in its cmd/
# (prometheus-operator), after the last part of its package. A comment
# `// MARK` at its end keeps it from being built by default. A file `ldflags`, if present, is added to the linker flags.
# Binaries go to ${DPO_TOOLS_DIR:-~/.cache/dpo-operator/tools}/NAME-<hash of the folder>/NAME, so a changed pin builds
# anew and an unchanged one is a no-op. Two builders at once are safe: a binary appears by rename.
# Where KUBEBUILDER_ASSETS names a folder that holds NAME, that binary is taken and nothing is built.
# Exit codes: 0 built or already there; 2 unknown tool; 3 Go is missing or too old to build; 1 the build failed.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cache="${DPO_TOOLS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/dpo-operator/tools}"

packages() { # FOLDER [MARK] -> the packages that its tools.go pins, or those with this mark ('': with none)
  local mark='\( *\/\/.*\)\{0,1\}'
  if [[ $# -gt 1 ]]; then mark="${2:+ *\/\/ $2}"; fi
  sed -n "s/^import _ \"\([^\"]*\)\"$mark\$/\1/p" "$1/tools.go"
}

by_package() { # FOLDER -> whether its programs are named after their packages
  [[ -d "$1/cmd" || $(packages "$1" | wc -l) -gt 1 ]]
}

tool_names() { # [MARK]
  local mod folder
  for mod in "$here"/tools/*/go.mod; do
    folder="$(dirname "$mod")"
    if by_package "$folder"; then
      packages "$folder" "$@" | sed 's|.*/||'
    elif [[ -n "$(packages "$folder" "$@")" ]]; then
      basename "$folder"
    fi
  done
}

folder_of() { # NAME -> the folder that pins it
  local mod
  if [[ -f "$here/tools/$1/go.mod" ]] && ! by_package "$here/tools/$1"; then echo "$here/tools/$1" && return; fi
  for mod in "$here"/tools/*/go.mod; do
    if by_package "$(dirname "$mod")" && packages "$(dirname "$mod")" | grep -q "/$1\$"; then
      dirname "$mod" && return
    fi
  done
  echo "build-tools: no tool named '$1' (there are: $(tool_names | tr '\n' ' '))" >&2
  exit 2
}

package_of() { # NAME FOLDER -> its package
  if [[ $(packages "$2" | wc -l) -eq 1 ]]; then packages "$2"; else packages "$2" | grep "/$1\$"; fi
}

binary_path() { # NAME -> path of its binary
  local name=$1 folder hash
  if [[ -n "${KUBEBUILDER_ASSETS:-}" && -x "$KUBEBUILDER_ASSETS/$name" ]]; then
    echo "$KUBEBUILDER_ASSETS/$name" && return
  fi
  folder="$(folder_of "$name")"
  hash="$(cd "$folder" && cat -- go.mod go.sum tools.go $(ls ldflags cmd/*/*.go 2>/dev/null) | sha256sum | cut -c1-16)"
  echo "$cache/$name-$hash/$name"
}

build() { # NAME
  local name=$1 folder target package scratch ldflags='-s -w'
  target="$(binary_path "$name")"
  if [[ ! -x "$target" ]]; then
    folder="$(folder_of "$name")"
    if ! command -v go >/dev/null; then
      echo "build-tools: Go is not installed, so '$name' cannot be built; install Go ($(sed -n 's/^go /needs >= /p' "$folder/go.mod")) from your distribution" >&2
      exit 3
    fi
    package="$(package_of "$name" "$folder")"
    if [[ -f "$folder/ldflags" ]]; then ldflags+=" $(tr '\n' ' ' <"$folder/ldflags")"; fi
    mkdir -p "$(dirname "$target")"
    # One builder at a time: the others find the binary when their turn comes.
    if command -v flock >/dev/null; then exec 9>"$(dirname "$target")/.lock" && flock 9; fi
    if [[ -x "$target" ]]; then echo "$target" && return; fi
    scratch="$target.$$"
    echo "build-tools: building $package (once)" >&2
    (cd "$folder" && CGO_ENABLED=0 go build -mod=readonly -trimpath -ldflags "$ldflags" -o "$scratch" "$package") ||
      { rm -f "$scratch"; echo "build-tools: '$name' did not build" >&2; exit 1; }
    mv -f "$scratch" "$target"
  fi
  echo "$target"
}

if [[ "${1:-}" == --path ]]; then
  binary_path "${2:?usage: hack/build-tools.sh --path NAME}"
  exit 0
fi
names=("$@")
if [[ "${1:-}" == --only ]]; then
  mapfile -t names < <(tool_names "${2:?usage: hack/build-tools.sh --only MARK}")
elif [[ ${#names[@]} -eq 0 ]]; then
  mapfile -t names < <(tool_names '')
fi
for name in "${names[@]}"; do build "$name"; done
