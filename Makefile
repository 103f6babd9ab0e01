# make serve [MODEL=directory or hub id] [PORT=8000] [ARGS='--max-model-len 2048 ...']
# make test  [ARGS='-k name ...']                 without ARGS: everything, files side by side in up to four processes
# make bench  ARGS='--model directory --tiny directory [--minutes 30] [--only W1 ...] [--peers ours vllm ...]'
# All take PYTHON= (the Python to use, and its torch if it has one) and TORCH_INDEX= (where to take torch from).

PORT ?= 8000
MODEL ?=
ARGS ?=
export PYTHON TORCH_INDEX

model_args = $(if $(MODEL),--model '$(MODEL)')
everything = -n auto --maxprocesses 4 --dist loadfile

.PHONY: serve test bench

serve:
	@.ci/setup
	@exec .venv/bin/python -m minivllm.entrypoints.openai.api_server $(model_args) --port '$(PORT)' $(ARGS)

test:
	@.ci/setup test
	@exec .venv/bin/python -m pytest $(or $(ARGS),$(everything))

bench:
	@.ci/setup
	@exec .venv/bin/python benchmarks/compare.py $(ARGS)
