# make demo    see it work, against a gateway of its own
# make test    everything a change has to pass; installs real servers in ~/.cache (once)
# make check   the part of it that reads the code
# make dist     a wheel, a source distribution, and what an installation of today consists of
# make screenshots  the pages that a browser shows after a sign-in, into docs/images
# make bench   how fast it is, against what stands beside it; some minutes

.PHONY: demo test check bench dist screenshots
.SILENT:

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore

demo: .venv/installed
	.venv/bin/keybroker demo

test: check
	tests/setup.sh
	.venv/bin/python -m pytest

check: .venv/installed-dev
	.venv/bin/ruff check --quiet
	.venv/bin/ruff format --quiet --check
	.venv/bin/mypy --no-error-summary

bench: .venv/installed
	.venv/bin/python -m benchmarks

# The versions are those of today; the rest is the same bytes wherever it is made.
dist: .venv/installed-dev
	rm -rf dist
	.ci/quietly .venv/bin/python -m hatchling build -d dist
	.venv/bin/python -m venv --without-pip dist/fresh
	.ci/quietly .venv/bin/python -m pip --python dist/fresh/bin/python install --no-compile dist/*.whl
	.ci/sbom dist/fresh/bin/python dist/keybroker.cdx.json
	rm -rf dist/fresh
	ls dist

screenshots: .venv/installed-dev
	.venv/bin/python -m tests.test_login_pages

.venv/created:
	.ci/venv

# `--group` needs pip 25.1, and before it commands were written that load `re` at every start
.venv/installed: pyproject.toml native/build.py native/key.c $(wildcard share/*.py) .venv/created
	.ci/quietly .venv/bin/python -m pip install --upgrade 'pip>=25.1'
	.ci/quietly .venv/bin/python -m pip install --editable .
	touch $@

.venv/installed-dev: .venv/installed
	.ci/quietly .venv/bin/python -m pip install --group dev
	touch $@
