# Every task of a developer or user. Each does its own set-up, on a fresh Debian machine, as root or with sudo.
#
#   make demo       boot a guest, migrate it live, print what happened
#   make test       the fast tests            make test-full  all of them
#   make matrix     every fault at every point of a migration; more than an hour, goes on where it was interrupted
#   make soak       twenty VMs moved and disturbed for two hours; SOAK=10m for ten minutes
#   make check      what a small change is held against: format, lints, unit tests; two minutes once it was built
#   make lint       format, lints, documentation, licences
#   make fuzz       every fuzz target for ten minutes         make fuzz-smoke  for ten seconds
#   make bench      vmirror and QEMU's own migration side by side; hours     make bench-quick  in under ten minutes
#   make bench-micro  the memory engine, stage by stage, beside memory copy and iperf3; figures under target/criterion
#   make setup      only the set-up           make clean      remove everything that was made
#
# QEMU=/path/to/qemu-system-x86_64 chooses another QEMU.

.DEFAULT_GOAL := help
.PHONY: help demo test test-full matrix soak check lint fuzz fuzz-smoke bench bench-quick bench-micro setup setup-rust setup-guest setup-userland setup-postgresql build build-demo build-tests clean
.NOTPARALLEL:

ifdef QEMU
export QEMU
endif

# How long each test had its testbed.
TIMES := $(CURDIR)/target/test-times

# End-to-end tests wait most of the time: for guests that boot, deadlines, and each other's agents. So many run at once.
export RUST_TEST_THREADS ?= $(shell expr 2 \* $$(nproc))

# Tests, demo and bench need root for network namespaces. Cargo starts what it has built through this.
ifneq ($(shell id -u),0)
ifneq ($(shell command -v sudo),)
sudo := sudo --preserve-env
as_root := CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$(sudo)"
endif
endif

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

demo: setup build-demo
	$(sudo) target/release/demo

# T=network_frames runs one file of the end-to-end tests, or those tests that have this in their name.
test: setup build-tests
	@rm -f $(TIMES)
	TEST_TIMES=$(TIMES) $(as_root) cargo test --release --workspace $(if $(T),--test it $(T))
	@setup/slowest $(TIMES)

# Among them a guest of 16 GiB, and a database at work that is moved.
test-full: setup setup-postgresql build-tests
	TABLE="$$PWD/docs/reliability.md" $(as_root) cargo test --release --workspace -- --include-ignored

# What is found is kept under target/matrix, with the logs of what is not as promised, and not tried again once it was. CELL=diskless/clock-jumps tries
# only what begins so, SEED=7 with another seed, LANES=1 one at a time.
matrix: setup build-tests
	TABLE="$$PWD/docs/reliability.md" $(as_root) cargo test --release --workspace --test it matrix:: -- --ignored --nocapture

soak: setup build-tests
	$(as_root) cargo test --release --workspace --test it soak:: -- --ignored --nocapture --test-threads 1

# Without optimisation, and without what needs a guest.
check: setup-rust
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	$(as_root) cargo test --workspace --lib

lint: setup-rust
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --release --workspace --no-deps
	setup/licences/check

# What parsers do with bytes that nobody should send. TARGETS="nbd_server qmp" runs only these.
fuzz-smoke: setup-rust
	fuzz/run 10 $(TARGETS)

fuzz: setup-rust
	fuzz/run 600 $(TARGETS)

# With the QEMU of setup/qemu-10 where there is one: guests do not survive the migration of QEMU 7.2's emulation under load.
# CELL="idle random-75" tries only these; BENCH="--runs 3 --out docs" gives it these options. Cells that were measured earlier stay in
# the document beside those, so all of them can be measured in several sittings. A run of all cells first measures what the
# engine sends through a cable; others take over what was measured last.
bench bench-quick: setup setup-userland build
	$(if $(filter bench,$@),$(if $(CELL),,$(engine_throughput)))
	[ -n "$$QEMU" ] || [ ! -x target/qemu-10/qemu-system-x86_64 ] || export QEMU="$$PWD/target/qemu-10/qemu-system-x86_64"; \
	  $(as_root) cargo run --release --quiet --package bench --bin bench -- $(if $(filter bench-quick,$@),--quick) $(addprefix --cell ,$(CELL)) $(BENCH)

# Without iperf3 there is nothing to hold it against, and the benchmark says "not measured".
define engine_throughput
@setup/packages iperf3 || echo "iperf3 cannot be installed"
$(as_root) cargo bench --quiet --package micro --bench engine -- --quiet 'memcpy|through'
endef

# FILTER=scan runs only what has this in its name.
bench-micro: setup
	@setup/packages iperf3
	$(as_root) cargo bench --package micro --bench engine -- $(FILTER)

setup: setup-rust setup-guest
	@setup/qemu-10

setup-rust:
	@setup/packages
	@setup/rust

setup-guest: setup-rust
	@setup/guest-kernel
	@setup/guest-image

# Only for the benchmark, and cells without it run where it cannot be made.
setup-userland: setup-rust
	@setup/userland benchmark

# Only for test-full, whose test of it is skipped, and says so, where it cannot be made.
setup-postgresql: setup-rust
	@setup/userland postgresql

# Tests start the program itself, so it is built first and with the same profile.
build: setup-rust
	cargo build --release --workspace

# Not the tests, fuzz targets and benchmarks of the rest: a newcomer waits for this.
build-demo: setup-rust
	cargo build --release --package vmirror --package bench --bin vmirror --bin demo

# With tests among what is built, Cargo gives dependencies the features that tests want. The programs are built in the same go, or everything
# would be compiled twice.
build-tests: setup-rust
	cargo build --release --workspace --bins --tests

clean:
	cargo clean
