# Every way in. `make` or `make help` lists them.
SHELL := /bin/bash
PY := .venv/bin/python
PYTEST := $(PY) -m pytest
export OMP_NUM_THREADS ?= 1

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

.PHONY: env env-dev programs
env: ## set up .venv with what a run needs
	@tools/environment all
env-dev: ## set up .venv with what the tests need
	@tools/environment dev
programs: env-dev ## bring the Kubernetes programs of the cluster tests (Go builds them once)
	@$(PY) tests/cluster/programs.py

.PHONY: run
run: env ## train the digits example on this machine: master, 2 parameter servers, 2 workers
	@.venv/bin/disttrain run examples/digits-ps.yaml

.PHONY: test test-unit test-training test-apiserver test-cluster test-monitoring
test: env-dev ## everything that CI runs: lint, types, unit, property, training, API-server, cluster tests
	@tools/test
test-unit: env-dev ## pure tests and properties, a minute
	@tools/test unit
test-training: env-dev ## real processes on loopback
	@tools/test training
test-apiserver: env-dev ## a real API server
	@tools/test apiserver
test-cluster: env-dev ## a real node: kubelet, containerd, both images
	@tools/test cluster
test-monitoring: env-dev ## a real Prometheus
	@tools/test monitoring

.PHONY: clients
clients: ## scripts and commands for the trainers of others, each beside its result under torchrun: ten minutes
	@tools/environment clients
	@tools/test clients

.PHONY: schedulers
schedulers: env-dev ## gangs under the schedulers of others: scheduler-plugins and Volcano, which Go builds once
	@tools/test schedulers

.PHONY: lint format crds lock
lint: env-dev ## format check, lint, types, layers, stale CRD
	@tools/test lint
format: env-dev ## format the code
	@$(PY) -m ruff format . && $(PY) -m ruff check --fix .
crds: env-dev ## generate crds/ from the models
	@$(PY) -m disttrain.api.crd > crds/.new && mv crds/.new crds/disttrainjobs.yaml
lock: env-dev ## write requirements/ from pyproject.toml
	@tools/lock

.PHONY: bench bench-ps bench-loop bench-loader bench-order bench-data bench-checkpoint bench-restart bench-resize bench-burst bench-sharded bench-bubble bench-tls bench-uneven
bench: bench-ps bench-loop bench-loader bench-sharded bench-bubble bench-order bench-data bench-checkpoint bench-restart bench-resize bench-burst bench-tls bench-uneven ## all benchmarks, each as ratios against a peer or a limit
bench-ps: env-dev ## the parameter server's step against gloo all_reduce and torch.distributed.rpc
	@$(PY) benchmarks/parameter_server.py
	@$(PY) benchmarks/parameter_server.py --copies
bench-loop: env-dev ## our loop against a bare PyTorch loop
	@$(PY) benchmarks/loop.py
bench-loader: env-dev ## our loop on samples that take time to load, against a plain loop with torch's DataLoader
	@$(PY) benchmarks/loader.py
bench-sharded: env-dev ## our loop under FullyShard, tensor and pipeline parallel against a bare PyTorch loop with the same wrapping
	@$(PY) benchmarks/sharded.py
bench-bubble: env-dev ## how long the processes of a pipeline are idle, beside the formula of each schedule
	@$(PY) benchmarks/bubble.py
bench-order: env-dev ## the computed order of an epoch against one that is kept as a table
	@$(PY) benchmarks/order.py
bench-data: env-dev ## packed, encrypted, replicated data against tensors in memory
	@$(PY) benchmarks/data.py
bench-checkpoint: env-dev ## what a checkpoint costs, in steps of the same run
	@$(PY) benchmarks/checkpoint.py
bench-restart: env-dev ## a lost process restarted in its pod against one of a new pod
	@$(PY) benchmarks/restart.py
	@$(PY) benchmarks/restart.py --servers
bench-resize: env-dev ## a worker of an elastic job that joins, and one that leaves
	@$(PY) benchmarks/resize.py
bench-tls: env-dev ## a step under TLS against the same without, and the bare exchange: DDP, and parameter servers
	@$(PY) benchmarks/encrypted.py
	@$(PY) benchmarks/parameter_server.py --tls --compute 30
bench-uneven: env-dev ## uneven work and random delays: hedged parts and bounded staleness against DDP
	@$(PY) benchmarks/uneven_work.py
bench-burst: env-dev ## 200 jobs of 4 pods against a bare client
	@$(PY) tests/cluster/programs.py apiserver
	@$(PY) benchmarks/burst.py

.PHONY: simulation mutate
simulation: env-dev ## the wide property tests of the plan, of whole operators and of the coordinator: an hour
	@DISTTRAIN_WIDE=1 $(PYTEST) tests/simulation -q
mutate: env-dev ## plant bugs into a copy of the operator; a named life of the simulation has to find each
	@tools/mutate
.PHONY: soak
soak: env-dev ## kill every process of local runs, and any two of fifty jobs; resize jobs thirty times; run the examples whole: a quarter of an hour
	@DISTTRAIN_WIDE=1 $(PYTEST) tests/training/test_local_run_faults.py tests/training/test_random_faults.py tests/training/test_local_run_whole.py tests/training/test_elastic.py -q

.PHONY: kind kind-down
kind: ## a kind cluster with operator, Prometheus, Grafana and the example; needs Docker and kind
	@deploy/kind/up.sh
kind-down: ## delete the kind cluster
	@deploy/kind/down.sh

.PHONY: clean
clean: ## remove .venv and what runs left in .disttrain
	@rm -rf .venv .disttrain .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
