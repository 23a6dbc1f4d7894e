# make demo: from nothing to a sheet of pictures.   make test: the test suite.   Both make .venv on first use.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test lint clean

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/ready
	$(PY) train.py --config small $(if $(wildcard runs/small/step-*/checkpoint.json),--resume)
	$(PY) sample.py --prompts prompts.txt --labels --out runs/demo.png --gif runs/demo.gif
	@echo "open runs/demo.png; then try: $(PY) sample.py --prompt \"a big red circle in the center on a blue background\""

test: .venv/ready
	$(PY) -m pytest

lint:
	ruff check . && ruff format --check .

clean:
	rm -rf .venv runs
