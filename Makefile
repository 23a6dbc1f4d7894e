# make demo: a sheet of pictures by the shipped weights, and one after training from nothing.
# make chat: on to conversations and edits.   make pretrain: small/base once more, into runs/base.
# make weights: all that the repository ships once more, in its place.
# make test: the test suite.   make check: lint, format, types and tests.   All make .venv on first use.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo chat pretrain weights test lint check clean

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/ready
	$(PY) sample.py --checkpoint small/checkpoint --prompts small/prompts.txt --labels --out runs/shipped.png
	@echo "runs/shipped.png: by the weights in small/checkpoint. Now the image side is trained from nothing:"
	$(PY) train.py --config small $(if $(wildcard runs/small/step-*/checkpoint.json),--resume)
	$(PY) sample.py --checkpoint runs/small --prompts small/prompts.txt --labels --out runs/demo.png --gif runs/demo.gif
	@echo "open runs/demo.png; then try: $(PY) sample.py --prompt \"a big red circle in the center on a blue background\""

chat: .venv/ready
	$(PY) train.py --config small $(if $(wildcard runs/small/step-*/checkpoint.json),--resume)
	$(PY) train.py --config small-chat $(if $(wildcard runs/small-chat/step-*/checkpoint.json),--resume)
	rm -rf runs/chat
	$(PY) sample.py --chat-file chat/messages.json --think --out runs/chat
	@echo "open runs/chat/chat.md; then try: $(PY) sample.py --chat --think"

pretrain: .venv/ready
	$(PY) -m small.pretrain --out runs/base

weights: .venv/ready
	rm -rf small/base small/checkpoint runs/weights
	$(PY) -m small.pretrain --out small/base
	$(PY) train.py --config small --steps 6000 --out runs/weights
	$(PY) evaluate.py --checkpoint runs/weights --json runs/weights.json
	$(PY) -m small.ship runs/weights --figures runs/weights.json

# Tensors are tiny: threads would only wait for each other. glibc keeps freed memory: a sixth of the tests'
# time went into giving it back and getting it again. The two longest files first: the rest fills the gaps.
test: export OMP_NUM_THREADS = 1
test: export MALLOC_TRIM_THRESHOLD_ = 4000000000
test: export MALLOC_MMAP_THRESHOLD_ = 4000000000
test: .venv/ready
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		tests/test_parallel.py tests/test_ablate.py tests

lint: .venv/ready
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

check: lint test

clean:
	rm -rf .venv runs
