.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS ?= tests
export PYTHONDONTWRITEBYTECODE ?=

.PHONY: help setup setup-dev serve test check format bench bench-peers bench-webhooks migrate revision lock

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.serve-ready ## Make the virtual environment that `make serve` needs

setup-dev: $(VENV)/.dev-ready ## Make the virtual environment that tests and checks need

# The development lock holds everything that serving needs, at the same versions: it counts for both.
$(VENV)/.serve-ready: requirements/embedded.txt bootstrap.py pyproject.toml
	@$(PYTHON) bootstrap.py $(VENV) requirements/embedded.txt
	@touch $@

$(VENV)/.dev-ready: requirements/dev.txt bootstrap.py pyproject.toml
	@$(PYTHON) bootstrap.py $(VENV) requirements/dev.txt
	@touch $@ $(VENV)/.serve-ready

serve: setup ## Run the gateway on this machine: PostgreSQL and Redis included
	@exec $(BIN)/aap serve

test: setup-dev check ## Run the checks and all tests
	@$(BIN)/python -m pytest -q -n auto --dist loadgroup --ignore tests/architecture $(TESTS)

check: setup-dev ## Format, lint, types, floors, dependencies, spelling, shape
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/pyright --level error
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/deptry .
	@$(BIN)/codespell
	@$(BIN)/python -m pytest -q tests/architecture

format: setup-dev ## Format the code, and mend what lint can mend
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: setup-dev ## Measure this gateway beside a bare relay and the provider itself
	@$(BIN)/python -m bench

bench-webhooks: setup-dev ## Measure how fast webhooks are delivered, and beside hostile endpoints
	@$(BIN)/python -m bench.webhooks

bench-peers: setup-dev ## Measure LiteLLM, TensorZero and Portkey beside this gateway
	@$(BIN)/python -m bench.peers

migrate: setup ## Bring the database schema up to date
	@$(BIN)/aap migrate

revision: setup-dev ## Write a migration from the tables: make revision NAME=what_it_does
	@$(BIN)/python -m migrations.revision $(NAME)

lock: ## Lock the requirements anew (needs uv)
	@sh requirements/compile.sh
