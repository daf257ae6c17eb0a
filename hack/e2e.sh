#!/usr/bin/env bash
# The product on a real cluster of this one machine: up, the story of tests/e2e, down (docs/e2e.md).
#
#   hack/e2e.sh            everything; the cluster is taken down whatever happens
#   E2E_KEEP=1 hack/e2e.sh leave it up, to look at; `make e2e-down` takes it down
#   E2E_KUBECONFIG=FILE    an existing cluster instead: docs/e2e.md says what it must have
# Exit codes: 0 done; 3 no cluster can run here (the reason is printed); 1 whatever else: a test failed, nothing was
# tested, something was left over, the harness itself broke.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=tests/support PYTHONUNBUFFERED=1
python=.venv/bin/python
cluster() { "$python" -m dpo_testing.realcluster "$@"; }

if [[ -z "${E2E_KUBECONFIG:-}" ]]; then
  why="$(cluster suitable)"
  case $? in
    0) ;;
    3) echo "e2e: skipped: $why"; exit 3 ;;
    *) echo "e2e: cannot tell whether a cluster can run here${why:+: $why}" >&2; exit 1 ;;
  esac
fi
began=$(date +%s)
# From here on any other code is a failure: pytest has a 3 of its own.
rc=0
if [[ -z "${E2E_KUBECONFIG:-}" ]]; then cluster up || rc=1; fi
if [[ $rc -eq 0 ]]; then
  "$python" -m pytest -m e2e tests/e2e -x -s -p no:cacheprovider ${PYTEST_ARGS:-} || rc=1
fi
if [[ -z "${E2E_KUBECONFIG:-}" ]]; then
  echo "e2e: times"
  cluster times
  if [[ $rc -ne 0 ]]; then cluster logs; fi
  if [[ -z "${E2E_KEEP:-}" ]]; then cluster down || rc=1; fi
fi
echo "e2e: ended with $rc after $(( $(date +%s) - began )) s"
exit $rc
