#!/usr/bin/env bash
# Builds the images with Docker or BuildKit, whichever is here: hack/build-images.sh [operator|trainer|trainer-cpu]...
#   REPOSITORY   prefix of the names (default: none: dpo-operator:<version>)
#   BASE_IMAGE   in place of the Dockerfile's own base image
#   CPU_BASE_IMAGE   for trainer, beside BASE_IMAGE: the plain Python on which our wheel is built
#   HASHES       set and empty: packages without a check of their hashes, for an index with builds of its own
#   PIP_CONF     pip configuration file for a private package index; it is a build secret and stays in no layer
#   BUILDKIT_HOST, BUILDCTL_OUTPUT   for buildctl: the daemon's address; where to (default: name and push=false)
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
created=$(git log -1 --format=%cI 2>/dev/null || echo 1970-01-01T00:00:00Z) # the commit's: a build again is the same
prefix=${REPOSITORY:+${REPOSITORY%/}/}

builder() {
  if docker version >/dev/null 2>&1; then echo docker
  elif command -v buildctl >/dev/null && buildctl debug workers >/dev/null 2>&1; then echo buildctl
  fi
}

arguments() { # key=value a line
  echo "VERSION=$version"; echo "REVISION=$revision"; echo "CREATED=$created"
  if [[ -n ${BASE_IMAGE:-} ]]; then echo "$1=$BASE_IMAGE"; fi
  if [[ -n ${HASHES+set} ]]; then echo "HASHES=$HASHES"; fi
  if [[ $2 == gpu && -n ${CPU_BASE_IMAGE:-} ]]; then echo "CPU_BASE_IMAGE=$CPU_BASE_IMAGE"; fi
}

build() { # file, target, name, name of the argument for the base
  local words=() line name="$prefix$3"
  if [[ $tool == docker ]]; then
    while read -r line; do words+=(--build-arg "$line"); done < <(arguments "$4" "$2")
    if [[ -n ${PIP_CONF:-} ]]; then words+=(--secret "id=pip,src=$PIP_CONF"); fi
    DOCKER_BUILDKIT=1 docker build -f "$1" --target "$2" -t "$name" "${words[@]}" .
  else
    while read -r line; do words+=(--opt "build-arg:$line"); done < <(arguments "$4" "$2")
    if [[ -n ${PIP_CONF:-} ]]; then words+=(--secret "id=pip,src=$PIP_CONF"); fi
    buildctl build --frontend dockerfile.v0 --local context=. --local dockerfile=. --opt "filename=$1" --opt "target=$2" \
      "${words[@]}" --output "${BUILDCTL_OUTPUT:-type=image,push=false},name=$name"
  fi
  echo "images: $name"
}

tool=$(builder)
if [[ -z $tool ]]; then
  echo "images: no builder answers here. Start Docker, or a BuildKit daemon with BUILDKIT_HOST set and buildctl on the PATH." >&2
  exit 3
fi
for image in "${@:-operator trainer}"; do
  for each in $image; do
    case $each in
      operator) build Dockerfile.operator operator "dpo-operator:$version" BASE_IMAGE ;;
      trainer) build Dockerfile.trainer gpu "dpo-trainer:$version" BASE_IMAGE ;;
      trainer-cpu) build Dockerfile.trainer cpu "dpo-trainer:$version-cpu" CPU_BASE_IMAGE ;;
      *) echo "images: '$each' is none of operator, trainer, trainer-cpu" >&2; exit 64 ;;
    esac
  done
done
