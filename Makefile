# TenSafe. `make help` lists the targets. Everything lands in .venv*, .cache and .state of this checkout.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PY := .venv/bin/python
PYTEST := $(PY) -m pytest
ARGS ?=
# What the coprocessor is made of; this runs on Python 3.10 too.
COPROCESSOR_TESTS := $(addprefix tests/,ckks crypto engines evidence lora observability package rpc session \
	services/attestor services/he_lora test_architecture.py test_settings.py)

.PHONY: help setup model test test-e2e test-all test-coprocessor-310 lint format protos demo up down demo-adapter bench bench-speculation trace bench-attestor bench-he fuzz compose-test clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-21s %s\n", $$1, $$2 }' Makefile

setup: ## prepare .venv (minutes the first time, no time after that)
	@scripts/setup.sh

model: setup ## convert the demo model once into .cache/models
	@$(PY) -m tensorguard.models.smollm2 --cache .cache/models

test: setup ## the fast tests
	$(PYTEST) -m "not e2e" $(ARGS)

test-e2e: model ## the tests that start vLLM and several processes
	$(PYTEST) -m "e2e and not slow" $(ARGS)

test-all: model ## all tests, with a dated report in reports/
	@scripts/test_all.sh $(ARGS)

test-coprocessor-310: ## the fast tests of the coprocessor and the attestor on Python 3.10, OpenFHE included (skipped without one)
	@scripts/setup_310.sh
	@if [ -d .venv310 ]; then .venv310/bin/python -m pytest -m "not e2e" $(COPROCESSOR_TESTS) $(ARGS); else echo "skipped: no Python 3.10"; fi

lint: setup ## style, types, protobuf rules and drift of the generated stubs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	cd protos && ../.venv/bin/buf lint
	PATH="$$PWD/.venv/bin:$$PATH" $(PY) scripts/generate_protos.py --check

format: setup ## put the code into the project's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

protos: setup ## generate the gRPC stubs
	PATH="$$PWD/.venv/bin:$$PATH" $(PY) scripts/generate_protos.py

demo: setup ## start everything, compare base, adapter and plaintext reference, stop everything
	@$(PY) -m tensorguard.cli.demo $(ARGS)

up: setup ## start the demo's services and leave them running
	@$(PY) -m tensorguard.cli.up up $(ARGS)

down: ## stop what `make up` started
	@if [ -x $(PY) ]; then $(PY) -m tensorguard.cli.up down $(ARGS); fi

demo-adapter: setup ## train the demo adapter anew
	$(PY) examples/demo_adapter/train.py $(ARGS)

bench: setup ## throughput and time to first token of base, plaintext LoRA and HE-LoRA (ARGS=--quick: only that it runs)
	$(PY) benchmarks/e2e.py $(ARGS)

bench-speculation: setup ## tokens per second and accepted guesses against k (ARGS=--quick: only that it runs)
	$(PY) benchmarks/speculation.py $(ARGS)

trace: setup ## where the time of an engine step goes, on both sides (reports/step.*)
	$(PY) benchmarks/step_trace.py --picture reports/step.png $(ARGS)

bench-attestor: setup ## verifications of evidence and key releases a second (ARGS=--quick: only that it runs)
	$(PY) benchmarks/attestor.py $(ARGS)

bench-he: setup ## z = A·x under CKKS: TenSafe beside OpenFHE and TenSEAL (reports/he_core.*)
	@scripts/setup_peers.sh
	$(PY) benchmarks/he_core.py $(ARGS)

fuzz: ## coverage-guided fuzzing of frames, sessions, shared memory, manifests and evidence (ARGS="--seconds 600"), report in reports/fuzz.txt
	@scripts/setup_fuzz.sh
	.venv-fuzz/bin/python -m fuzz $(ARGS)

compose-test: setup ## build the images, start them with compose, run the client test against them
	scripts/compose_test.sh $(ARGS)

clean: down ## remove the environment, caches and local state
	rm -rf .venv .venv310 .venv-peers .venv-fuzz .cache .state .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
