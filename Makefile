# `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
# megatron-core needs Python 3.12: python3.12 on the PATH, else pyenv's. A shim may be there and not run, so each is tried.
PYTHON ?= $(shell for python in python3.12 "$$(pyenv prefix 3.12 2>/dev/null)/bin/python3.12" python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && { echo "$$python"; break; }; done)
STAMP := $(VENV)/.installed
EXTRAS := operator,trainer,quickstart,wandb,mlflow,dev
# Test processes, of one thread each: four on two cores, because tests on a control plane mostly wait.
JOBS ?= 4
export OMP_NUM_THREADS ?= 1
# Our own modules are compiled once, not in each of the many processes that tests start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(STAMP) ## create .venv with everything, at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt hack/setup.sh
	@test -n "$(PYTHON)" || { echo "Python 3.12 is needed (megatron-core); found neither python3.12 nor pyenv's" >&2; exit 1; }
	@echo "setup: installing into $(VENV) (torch and its CUDA libraries are about 5 GB; minutes the first time)"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@hack/setup.sh $(VENV) $(EXTRAS)
	@touch $@

.PHONY: quickstart
quickstart: setup ## make a small world and align its model over S3, on this machine
	@env -u OMP_NUM_THREADS $(BIN)/python examples/quickstart/quickstart.py

.PHONY: tools
tools: ## build the Go programs that the tests run (a control plane, an S3 server), once
	@hack/build-tools.sh test || [ $$? -eq 3 ] # 3: no Go here; the tests that need them say so and skip

.PHONY: tools-started
tools-started: ## start that in the background; a test that needs a program waits for it
	@hack/build-tools.sh --background test || [ $$? -eq 3 ]

.PHONY: test
test: tools-started setup lint ## lint, types, import contracts, generated files, all tests but the nightly ones and e2e
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

# Side by side, so that each process collects and imports its own part only: torch alone takes seconds.
.PHONY: check
check: setup ## the quick part of `make test`: lint, and the tests without a training run, a cluster or a Go program
	@$(MAKE) --no-print-directory --jobs=4 --output-sync=target check-others check-trainer check-operator run-lint

QUICK := $(BIN)/python -m pytest -q -m "not (slow or cluster or tools or nightly or e2e)"
.PHONY: check-trainer check-operator check-others
check-trainer:
	$(QUICK) $(PYTEST_ARGS) tests/trainer tests/test_preloaded.py
check-operator:
	$(QUICK) $(PYTEST_ARGS) tests/operator --ignore=tests/operator/cluster
# All but what the two above run, and directories whose tests are all slow.
check-others:
	$(QUICK) $(PYTEST_ARGS) tests $(addprefix --ignore=tests/,trainer test_preloaded.py operator distributed e2e \
		monitoring/test_monitoring_on_prometheus.py)

.PHONY: nightly
nightly: setup tools ## the tests that `make test` leaves out, but for the real cluster
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m nightly $(PYTEST_ARGS)

.PHONY: lint
lint: setup ## ruff, strict types, import contracts, the docs site
	@$(MAKE) --no-print-directory run-lint

.PHONY: run-lint
run-lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

.PHONY: docs
docs: setup ## build the docs site into build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: generate
generate: setup ## rewrite what is generated: the CRD, the reference and operations pages, dashboards, alerts, the chart's files
	$(BIN)/python -m dpo_api.crd > crds/dpojobs.yaml
	$(BIN)/python -m dpo_api.docs > docs/api.md
	$(BIN)/python -m dpo_operator.docs > docs/operations.md
	PYTHONPATH=charts$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -m dpo_monitoring
	$(BIN)/python hack/chart.py

.PHONY: bench
bench: setup ## run the benchmarks; each prints a ratio against a peer
	@failed=; for bench in benchmarks/*.py; do \
	    echo "== $$bench"; env -u OMP_NUM_THREADS $(BIN)/python "$$bench" || failed="$$failed $$bench"; \
	done; if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

.PHONY: soak
soak: setup tools ## the tests on a real control plane, five times over: none may fail now and then
	@for round in 1 2 3 4 5; do $(BIN)/python -m pytest -x -m cluster $(PYTEST_ARGS) tests/operator/cluster; done

.PHONY: e2e
e2e: setup ## the product on a real cluster of this machine: images, chart, jobs under faults (root, Linux)
	@hack/e2e.sh || [ $$? -eq 3 ] # 3: no cluster can run here; it has said why

.PHONY: e2e-up
e2e-up: setup ## bring that cluster up and leave it
	@PYTHONPATH=tests/support $(BIN)/python -m dpo_testing.realcluster up

.PHONY: e2e-down
e2e-down: setup ## take it down; nothing is left but the cache
	@PYTHONPATH=tests/support $(BIN)/python -m dpo_testing.realcluster down

.PHONY: images
images: ## build both images with Docker or BuildKit (IMAGES="operator trainer-cpu" REPOSITORY=… BASE_IMAGE=…)
	@hack/build-images.sh $(IMAGES)

.PHONY: sbom
sbom: setup ## list what each image installs, as CycloneDX, in build/sbom
	@$(BIN)/python hack/sbom.py

.PHONY: lock
lock: setup ## rewrite constraints.txt and hack/image/hashes.txt
	@mkdir -p build && PATH="$(CURDIR)/$(BIN):$$PATH" hack/lock.sh

.PHONY: format
format: setup ## let ruff rewrite the code's form
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format --quiet .

.PHONY: clean
clean: ## remove what was built here, .venv included
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
