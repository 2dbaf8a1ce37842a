# make demo   environment, install, the main job: distil support-sql and build it for a laptop
# make test   the same environment, then every check
# make clean  remove the environment and caches; never the workspace or bundles

PYTHON ?= python3

.PHONY: demo test env clean

demo: env
	.venv/bin/edgedistill build --target laptop

test: env
	.venv/bin/python scripts/check.py

env:
	@$(PYTHON) scripts/setup_env.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build
