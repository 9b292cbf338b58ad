# Four targets; what each does stands in attn_lessons/.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
RUN = .venv/bin/python -m
PORT ?= 8888

.PHONY: start test book clean python
.DEFAULT_GOAL := start

start: python
	@$(PYTHON) -m attn_lessons.start --install --port "$(PORT)"

test: python
	@$(PYTHON) -m attn_lessons.install test
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy attn_lessons
	$(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder

book: python
	@$(PYTHON) -m attn_lessons.install book
	$(RUN) attn_lessons.bookbuild

clean:
	rm -rf .venv _build book/_build book/_vendor dist .pytest_cache .mypy_cache .ruff_cache

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'Python 3.11 or newer is needed and was not found. Name one: make start PYTHON=/path/to/python3.12' >&2; \
	  exit 1; }
