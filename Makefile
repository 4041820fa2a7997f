# gmgate. `make` lists the targets.

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
LDFLAGS  := -X main.version=$(VERSION) -X main.revision=$(REVISION)

FUZZTIME  ?= 10s
BENCHTIME ?= 1s
SOURCES   := bench bpf cmd control dataplane scripts
RESULTS   := bin/results
TESTSUM   := bin/testsum

.PHONY: help build deps deps-demo demo test test-unit test-netns test-vm test-total fuzz bench lint generate clean FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: bin/gmgate ## build bin/gmgate, one static program

bin/gmgate: FORCE # the go command knows best what is out of date
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/gmgate

$(TESTSUM): FORCE
	@go build -o $@ ./scripts/testsum

deps: ## install the Debian packages that the tests need, where missing
	scripts/deps.sh

deps-demo: # what the demo needs of them
	scripts/deps.sh demo

demo: deps-demo build ## phones, gmgate and a core in network namespaces: register, call, and look at the wire
	bin/gmgate demo

test: deps test-unit test-netns test-vm test-total ## all tests, in this order

test-unit: $(TESTSUM) ## vet, format, module file, eBPF objects, and the tests that need nothing, with the race detector
	go vet ./...
	@unformatted=$$(gofmt -l $(SOURCES)); [ -z "$$unformatted" ] || { echo "not formatted: $$unformatted"; exit 1; }
	go mod tidy -diff
	scripts/generated.sh
	@# Allocations are counted without the race detector, which makes some of its own. A flood of one goroutine has no races
	@# to find, and takes six times as long with it.
	packages=$$(scripts/packages.sh pure); status=0; \
	{ go test -json -race -shuffle=on -skip "Alloc|^TestFlood$$" -timeout 5m $$packages || status=1; \
	  go test -json -run "Alloc|^TestFlood$$" -timeout 5m $$packages || status=1; \
	  exit $$status; } | $(TESTSUM) -results $(RESULTS) unit

test-netns: $(TESTSUM) build ## tests that make network namespaces (root; REQUIRE_KERNEL_TESTS=1 turns skips into failures)
	go test -json -count=1 -p 1 -timeout 10m $$(scripts/packages.sh kernel) | $(TESTSUM) -results $(RESULTS) netns

test-vm: $(TESTSUM) ## tests against a kernel with ESP, in a virtual machine
	scripts/vm/test.sh 2>&1 | $(TESTSUM) -results $(RESULTS) vm

test-total: $(TESTSUM) ## sum of the last unit, netns and vm runs
	@$(TESTSUM) -results $(RESULTS) -total unit netns vm

fuzz: ## every fuzz target for FUZZTIME (10s)
	scripts/fuzz.sh $(FUZZTIME)

bench: ## every benchmark for BENCHTIME (1s)
	go test -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) ./...

lint: ## staticcheck and golangci-lint (the first run builds them, which takes minutes)
	go tool -modfile=scripts/tools.mod staticcheck ./...
	go tool -modfile=scripts/lint.mod golangci-lint run

generate: ## run the code generators
	go generate ./...

clean: ## remove what was built
	rm -rf bin
