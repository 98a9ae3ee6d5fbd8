# vpc-nat-gateway: what a person or a CI runs. Everything else is `.venv/bin/natgw --help`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin
export PATH

BIN := .venv/bin
LAB := $(BIN)/natgw lab
DEMO := examples/vpc-nat-gateway.yaml
# Narrow a run, e.g.: make test PYTEST_ARGS='tests -k snat'
PYTEST_ARGS ?=

# Narrow a measurement, e.g.: make bench BENCH=flows QUICK=1
BENCH ?=
QUICK ?=
PAGE ?=

.PHONY: help setup setup-test setup-image demo check test again-alone fuzz bench image image-test audit sbom lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing: system packages, and Python dependencies into .venv
	@scripts/setup.sh

setup-test:
	@scripts/setup.sh test

setup-image:
	@scripts/setup.sh image

# However it ends, the lab is taken down, unless `lab up` refused (2): then nothing was built, and a lab of that name is not ours.
demo: setup ## build the example VPC in network namespaces, send real packets through it, show the result (root)
	@built=yes; trap '[ $$built = no ] || $(LAB) down --name demo' EXIT; trap 'exit 143' HUP TERM; \
	$(LAB) up --name demo -f $(DEMO) || { status=$$?; [ $$status != 2 ] || built=no; exit $$status; }; \
	$(LAB) test --name demo

check: setup ## linters, types and import arrows; no network, no root
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

test: setup-test check ## make check, then every test: pure ones, and real packets in network namespaces (root)
	@if [ -n "$(PYTEST_ARGS)" ]; then exec $(BIN)/python -m pytest $(PYTEST_ARGS); fi; \
	$(BIN)/python -m pytest -n 4 --dist loadfile --maxfail 3 -m 'not alone' || $(MAKE) again-alone FAILED=$$?; \
	$(BIN)/python -m pytest -m alone

# Four tests at once on a machine that others use, too, can make any program stand still for seconds, which no test is there
# to judge. So what fails beside others, two tests at most, is decided by a run with nothing beside it. Both runs are printed.
again-alone:
	@[ $(FAILED) = 1 ] || exit $(FAILED); \
	printf '\n=== Failed beside others; run again with nothing beside, which decides\n'; \
	$(BIN)/python -m pytest --last-failed --last-failed-no-failures none -m 'not alone'

fuzz: setup ## two million malformed BFD packets, thousands of inputs for every other parser and the API, and random ones for every property; minutes, no root
	@NATGW_FUZZ_PACKETS=1000000 NATGW_FUZZ_CASES=5000 NATGW_FUZZ_REQUESTS=300 $(BIN)/python -m pytest -n 2 --dist load \
	    tests/test_bfd_fuzz.py $$(grep -l hypothesis tests/test_*.py)

bench: setup-test ## measure what the gateway costs, into build/bench (root; QUICK=1, BENCH='flows verbs', PAGE=1: also docs/performance.md)
	@$(BIN)/python -m bench $(BENCH) $(if $(QUICK),--quick) $(if $(PAGE),--page)

soak: setup-test ## kill -9 the daemon 500 times at random moments under load, and count what is lost (root; KILLS=n)
	@NATGW_SOAK_KILLS=$${KILLS:-500} $(BIN)/python -m pytest -s netns-tests/test_soak.py

image: setup-image ## build the container image and print its sizes (root; BASE=registry|stand-in says whence its base)
	@scripts/image.sh build

image-test: image ## run the image as Kube-OVN would, with real packets (root)
	@$(BIN)/python -m pytest netns-tests/image

sbom: image ## list what is in the image, as CycloneDX, under build/sbom
	@scripts/sbom.sh

audit: ## look the locked Python dependencies up among known vulnerabilities (exit status 2: no data, and it says for what)
	@scripts/audit.sh

lock: ## pin the Python dependencies anew from pyproject.toml (UPGRADE=1: to their newest versions)
	@scripts/lock.sh

clean: ## remove what setup and the tools made in this directory
	@[ ! -d build/containers ] || scripts/image.sh remove
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
