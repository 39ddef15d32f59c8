# pgqueue: everything a developer or CI runs. `make` lists the targets.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
ORDERS ?= 200
PYTEST_ARGS ?=
# Most tests wait for processes most of the time.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
# Tests and checks look at these, as far as they are there.
CODE := $(wildcard pgqueue pytest_pgqueue.py examples migrations tests benchmarks scripts)
TYPED := $(wildcard pgqueue pytest_pgqueue.py examples)

# The first Python that is 3.11 or newer: $PYTHON, python3, python3.13, python3.12, python3.11.
define bootstrap
	@for candidate in $(if $(PYTHON),"$(PYTHON)") python3 python3.13 python3.12 python3.11; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$candidate"; break; fi; \
	  if [ "$$candidate" = "$(PYTHON)" ]; then echo "install: $$candidate is not Python 3.11 or newer; trying others" >&2; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo "install: error: pgqueue needs Python 3.11 or newer, none was found; install one (Debian 12: apt-get install python3) or say make PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	"$$found" scripts/bootstrap.py $(1) $(if $(PYTHON),--base "$$found")
endef

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: install ## run the example shop on an embedded Postgres (ORDERS=200)
	@$(BIN)/pgqueue demo --orders $(ORDERS)

.PHONY: test
test: install check tools ## install, check, and run every test but the slow ones; what CI runs
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)
	@echo "what a job costs, as ratios:"
	@$(BIN)/python benchmarks/quick.py

.PHONY: check
check: lint types imports ## lint, types and the import rules

.PHONY: install
install: ## make .venv with the pinned packages (PYTHON=/usr/bin/python3 chooses the Python)
	$(call bootstrap,install)

.PHONY: fmt
fmt: install ## format the code and mend what ruff can mend
	$(BIN)/ruff check --fix --quiet $(CODE)
	$(BIN)/ruff format $(CODE)

.PHONY: lint
lint: install ## ruff: rules and format
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

.PHONY: types
types: install ## mypy --strict
	$(BIN)/mypy $(TYPED)

.PHONY: imports
imports: install ## import-linter: imports go down only
	$(BIN)/lint-imports

.PHONY: test-fast
test-fast: install ## unit and integration tests only
	$(BIN)/python -m pytest tests/unit tests/integration $(PYTEST_ARGS)

.PHONY: test-faults
test-faults: install tools ## the whole fault suite (20 minutes); writes its table into docs/reliability.md
	PGQUEUE_WRITE_DOCS=1 $(PYTEST) tests/faults -m "slow or not slow" $(PYTEST_ARGS)

# Programs that some tests use, most of them tests of faults, and the Debian packages that bring them.
TOOLS := ip:iproute2 iptables:iptables faketime:faketime patch:patch pgbouncer:pgbouncer strace:strace unshare:util-linux
.PHONY: tools
tools: ## install the programs that some tests use, as root on Debian; elsewhere say which are missing
	@missing=""; \
	for tool in $(TOOLS); do \
	  PATH="$$PATH:/usr/sbin:/sbin" command -v "$${tool%%:*}" >/dev/null || missing="$$missing $${tool##*:}"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "apt-get install$$missing"; export DEBIAN_FRONTEND=noninteractive; \
	  apt-get install -y -q --no-install-recommends $$missing >/dev/null 2>&1 \
	    || { apt-get update -q >/dev/null 2>&1; apt-get install -y -q --no-install-recommends $$missing >/dev/null 2>&1; } \
	    || echo "could not install$$missing: the tests that need them are skipped" >&2; \
	else \
	  echo "missing packages:$$missing; the tests that need them are skipped (apt-get install$$missing as root)" >&2; \
	fi

.PHONY: test-pg15
test-pg15: install ## make test's tests on Debian's PostgreSQL 15
	@if [ ! -x /usr/lib/postgresql/15/bin/postgres ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "apt-get install postgresql-15"; \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -q postgresql-15 >/dev/null \
	      || { apt-get update -q >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -q postgresql-15 >/dev/null; } || exit 1; \
	  else \
	    echo "error: make test-pg15 needs /usr/lib/postgresql/15/bin; run apt-get install postgresql-15 as root" >&2; exit 1; \
	  fi; \
	fi
	PGQUEUE_TEST_PG=15 $(PYTEST) -m "not slow" $(PYTEST_ARGS)

.PHONY: test-pg16
test-pg16: install ## make test's tests on PostgreSQL 16, from the wheel
	PGQUEUE_TEST_PG=16 $(PYTEST) -m "not slow" $(PYTEST_ARGS)

.PHONY: bench
bench: install ## benchmarks against peers, what is missing of them (PEERS="…" MEASURES="…" BENCH_ARGS="--quick")
	$(BIN)/python -m benchmarks run $(if $(PEERS),--peers $(PEERS)) $(if $(MEASURES),--measures $(MEASURES)) $(BENCH_ARGS)

.PHONY: docs
docs: install ## build docs/ as a site into site/; a warning is an error
	$(BIN)/zensical build --strict --clean
	@echo "open site/index.html; the search needs a server: python3 -m http.server -d site"

.PHONY: lock
lock: ## write requirements.lock from pyproject.toml (UPGRADE=1 takes newer versions)
	$(call bootstrap,lock)

.PHONY: clean
clean: ## remove .venv, caches and build output
	rm -rf $(VENV) .venv.lock build dist site .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
