# Everything from nothing on Debian 13 with root, Python 3.11 or newer, pip and apt:
#   make demo    runs the main job: two processes load a ResNet-50 through a mount
#   make test    passes the tests, in several processes; with ARGS in one: make test ARGS='tests/unit/test_text.py -x'
#   make reliability  injects faults and prints a table of what was survived
#   make model   tries random sequences beside a reference model for long: make model EXAMPLES=20000
#   make test-machines  boots Debian's kernels in virtual machines, and tries mounts there; half an hour for each
#   make soak    does everything at once for 15 minutes: make soak ARGS='--hours 8 --seed 2'
#   make bench   measures against a native file, downloads, rclone, JuiceFS, s3fs and Run:ai's streamer, over https
#   make bench-fleet  measures hosts that fetch from each other beside the store alone, in network namespaces
#   make engines loads models by 36 unchanged programs, from a mount of S3, locally and in forks, and compares
#   make dist    builds wheels, a Debian package and a container image, each with its bill of materials, below dist/
#   make eval    measures what sharing gains MXNet's networks: the TrIMS paper's evaluation
#   make push    pushes the image and names it by its digest in the Kubernetes manifests: REGISTRY=registry.example.com/trimsfs
#   make docs    writes the documentation as a site into build/site
#   make man     writes man pages and completions, from the commands, into packaging/man and packaging/completions
# And on a host with an NVIDIA GPU and its driver:
#   make bench-gpu   measures models on the GPU beside plain copies and other loaders
#   make test-gpu    passes the tests that only a GPU shows
# All install what they need. Frameworks whose needs clash have an environment each.

EXAMPLES ?= 1500
PYTHON ?= $(shell command -v python3.11 || command -v python3)
HAS_MXNET := $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info < (3, 12) else "")')

MAIN := .venv
MXNET := .venv-mxnet
FRAMEWORKS := .venv-frameworks
ENGINES := .venv-engines
HEAVY := .venv-heavy
GPU := .venv-gpu
DIST := .venv-dist
TESTING := $(MAIN)/ready-dev $(MAIN)/ready-kserve $(MAIN)/ready-azurite
DEMO_ENVIRONMENT := $(if $(HAS_MXNET),$(MXNET),$(FRAMEWORKS))

APT_main := fuse3 gcc libfuse3-dev pkg-config $(if $(filter /usr/bin/%,$(PYTHON)),python3-dev python3-venv)
APT_test := attr btrfs-progs bubblewrap busybox-static ceph-common ceph-mon ceph-osd crun dnsmasq-base \
	docker-registry erofs-utils faketime fio fish iproute2 man-db mandoc nginx-light openssl podman radosgw runc tmux \
	xfsprogs zsh
APT_all := chromium fonts-dejavu-core kmod qemu-system-x86 runsc xz-utils
APT_reliability := qemu-utils
APT_machines := mmdebstrap openssh-client qemu-system-x86 qemu-utils
APT_bench := s3fs
APT_fleet := iproute2 nginx-light
APT_wheels := dpkg-dev pkg-config python3-dev python3-venv
APT_dist := $(APT_wheels) build-essential debhelper mmdebstrap podman systemd-container
APT_GET := DEBIAN_FRONTEND=noninteractive apt-get -q
apt_install = $(APT_GET) update && $(APT_GET) install -y --no-install-recommends $(1)
# The packages that are not installed; if there are none, make needs no root.
missing = $(shell dpkg-query -W -f '$${db:Status-Status} $${binary:Package}\n' $(1) 2>/dev/null \
	| sed -n 's/^installed //p' | sed 's/:.*//' | sort > /tmp/trimsfs-installed.$$$$; \
	printf '%s\n' $(1) | sort | comm -23 - /tmp/trimsfs-installed.$$$$; rm -f /tmp/trimsfs-installed.$$$$)

.PHONY: demo test test-all test-gpu reliability model soak audit engines bench bench-fleet bench-gpu eval card lint docs man \
	protocol clean apt-main apt-test apt-all apt-npm apt-reliability apt-machines apt-bench apt-fleet test-machines

demo: $(MAIN)/ready $(DEMO_ENVIRONMENT)/ready
	$(MAIN)/bin/python -m tests.demo $(abspath $(DEMO_ENVIRONMENT)/bin/python)

# Tests wait half of the time: five processes keep two cores busy.
WORKERS = $(shell n=$$(($$(nproc) * 2 + 1)); echo $$((n < 5 ? n : 5)))

# Compiles first: tests start hundreds of servers, which cannot write bytecode.
test: apt-test $(TESTING) $(if $(HAS_MXNET),$(MXNET)/ready) $(FRAMEWORKS)/ready lint
	$(MAIN)/bin/python -m compileall -q trimsfs mountctl
	$(MAIN)/bin/python -m pytest -m 'not slow and not gpu' $(or $(ARGS),-n $(WORKERS))

test-all: apt-test apt-all apt-reliability $(TESTING) $(if $(HAS_MXNET),$(MXNET)/ready) $(FRAMEWORKS)/ready $(HEAVY)/ready lint dist
	$(MAIN)/bin/python -m pytest -m 'not gpu and not machine' $(ARGS)

# The wheel is tried on Debian 12, whose Python is 3.11: PYTHON must be that.
test-machines: apt-machines $(MAIN)/ready-dev deb
	rm -rf build/machines/wheelhouse
	$(WITH_DIST) pip -q --python $(PYTHON) download --only-binary :all: -d build/machines/wheelhouse \
		dist/trimsfs-$(VERSION)-cp311-*.whl
	$(MAIN)/bin/python -m pytest -m machine tests/machines $(ARGS)

reliability: apt-test apt-reliability $(TESTING)
	$(MAIN)/bin/python -m pytest -m 'not gpu' tests/reliability tests/security $(ARGS)

model: apt-test $(MAIN)/ready-dev
	MODEL_EXAMPLES=$(EXAMPLES) $(MAIN)/bin/python -m pytest -m slow tests/reliability/test_model.py $(ARGS)

soak: apt-test $(MAIN)/ready-dev
	$(MAIN)/bin/python -m tests.reliability.soak $(ARGS)

engines: apt-main $(MAIN)/ready-bench $(MAIN)/ready-dev $(FRAMEWORKS)/ready $(ENGINES)/ready \
		$(HEAVY)/ready $(if $(HAS_MXNET),$(MXNET)/ready)
	$(MAIN)/bin/python -m tests.engines $(ARGS)

bench: apt-bench $(MAIN)/ready-bench $(FRAMEWORKS)/ready $(if $(HAS_MXNET),$(MXNET)/ready)
	$(MAIN)/bin/python -m tests.benchmarks $(ARGS)

bench-fleet: apt-fleet $(MAIN)/ready-dev
	$(MAIN)/bin/python -m tests.benchmarks.fleet $(ARGS)

eval: apt-main $(MAIN)/ready-bench $(MXNET)/ready
	$(MAIN)/bin/python -m tests.evaluation $(abspath $(MXNET)/bin/python) $(ARGS)

VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' trimsfs/__init__.py)
# Wheels are built for each of these that has its headers, one for each version; PYTHONS= names others.
PYTHONS ?= $(PYTHON) $(wildcard /usr/bin/python3.1? /usr/local/bin/python3.1? $(HOME)/.pyenv/versions/3.*/bin/python)
WITH_DIST = PATH=$(abspath $(DIST)/bin):$$PATH

.PHONY: dist wheels wheelhouse deb image push apt-wheels apt-dist

dist: deb image

wheels: apt-wheels $(DIST)/ready
	rm -rf dist
	$(WITH_DIST) packaging/wheels.sh dist $(VERSION) $(PYTHONS)

# The wheel for Debian's Python and all that it needs, as the package and the image have it.
wheelhouse: wheels
	rm -rf build/wheelhouse
	$(WITH_DIST) pip -q --python /usr/bin/python3 download --only-binary :all: -d build/wheelhouse \
		"$$(ls $(CURDIR)/dist/trimsfs-$(VERSION)-$$(/usr/bin/python3 -c 'import sys; print("cp%d%d" % sys.version_info[:2])')-*.whl)[az,csi,fleet,gs,hf,signatures]"

deb: apt-dist wheelhouse
	$(WITH_DIST) packaging/deb.sh dist build/wheelhouse $(VERSION)

image: apt-dist wheelhouse
	$(WITH_DIST) packaging/image.sh dist $(VERSION)

# Of the image that `make image` has built.
push:
	packaging/push.sh $(or $(REGISTRY),$(error REGISTRY= must say where the image goes: registry.example.com/trimsfs)) $(VERSION)

bench-gpu: card $(GPU)/ready
	$(GPU)/bin/python -m tests.benchmarks.gpu $(ARGS)

test-gpu: card $(GPU)/ready-dev
	TEST_GPU=$(abspath $(GPU)) $(GPU)/bin/python -m pytest -m gpu $(ARGS)

# Fails if there is no GPU, before gigabytes are installed for one.
card: $(MAIN)/ready-cuda
	@$(MAIN)/bin/python -m tests.benchmarks.gpu --check

lint: $(MAIN)/ready-dev
	$(MAIN)/bin/ruff check .
	$(MAIN)/bin/ruff format --check .
	$(MAIN)/bin/mypy

# Needs the Python package index; exits with 3 if it cannot be reached.
audit: $(MAIN)/ready-dev
	PYTHONWARNINGS=ignore $(MAIN)/bin/pip install -q -e '.[audit]'
	$(MAIN)/bin/python -m tests.security.audit

docs: $(MAIN)/ready-docs
	NO_MKDOCS_2_WARNING=1 $(MAIN)/bin/mkdocs build

man: $(MAIN)/ready
	$(MAIN)/bin/python packaging/manual.py packaging

# After a change of csi.proto.
protocol: $(MAIN)/ready-dev
	$(MAIN)/bin/python -m grpc_tools.protoc -Imountctl/extras/csi --descriptor_set_out=mountctl/extras/csi/csi.binpb \
		--pyi_out=mountctl/extras/csi csi.proto

apt-test apt-all apt-npm apt-reliability apt-machines apt-bench apt-fleet: apt-main
apt-main apt-test apt-all apt-wheels apt-dist apt-reliability apt-machines apt-bench apt-fleet: apt-%:
	$(if $(call missing,$(APT_$*)),$(call apt_install,$(call missing,$(APT_$*))))

apt-npm:
	$(if $(shell command -v npm),,$(call apt_install,npm))

$(MAIN)/ready: pyproject.toml setup.py $(wildcard trimsfs/*/*.[ch]) | apt-main
	$(PYTHON) -m venv $(MAIN)
	$(MAIN)/bin/pip install -q --upgrade pip
	PYTHONWARNINGS=ignore $(MAIN)/bin/pip install -q -e .
	touch $@

$(addprefix $(MAIN)/ready-,dev bench docs cuda): $(MAIN)/ready-%: $(MAIN)/ready
	PYTHONWARNINGS=ignore $(MAIN)/bin/pip install -q -e '.[$*]'
	touch $@

# Of KServe's package, tests read the fields of its objects; all that it needs would be 500 MB.
$(MAIN)/ready-kserve: $(MAIN)/ready-dev
	$(MAIN)/bin/pip install -q --no-deps --upgrade --target $(MAIN)/kserve 'kserve>=0.21,<1'
	touch $@

# Azurite stands in for Azure.
$(MAIN)/ready-azurite: $(MAIN)/ready-dev
	PATH="$(abspath $(MAIN))/bin:$$PATH" timeout 300 npm install --silent --no-fund --no-audit --prefix $(MAIN)/node \
		'azurite@^3' || echo "npm cannot install azurite: the tests of az:// that need it are left out"
	touch $@

$(DIST)/ready: packaging/requirements.txt
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/pip install -q -r $<
	touch $@

$(GPU)/ready: tests/benchmarks/gpu/requirements-gpu.txt $(MAIN)/ready | card
	$(PYTHON) -m venv $(GPU)
	PYTHONWARNINGS=ignore $(GPU)/bin/pip install -q -r $< -e '.[cuda]'
	touch $@

$(GPU)/ready-dev: $(GPU)/ready
	PYTHONWARNINGS=ignore $(GPU)/bin/pip install -q -e '.[dev]'
	touch $@

$(MXNET)/ready $(FRAMEWORKS)/ready $(HEAVY)/ready: .venv-%/ready: tests/frameworks/requirements-%.txt | apt-main
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q -r $<
	touch $@

$(ENGINES)/ready: tests/engines/requirements-engines.txt | apt-npm
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/pip install -q -r $<
	npm install --silent --no-fund --no-audit --prefix $(ENGINES)/node 'node-llama-cpp@^3'
	touch $@

clean:
	rm -rf $(MAIN) $(MXNET) $(FRAMEWORKS) $(ENGINES) $(HEAVY) $(GPU) $(DIST) build dist packaging/man packaging/completions *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
