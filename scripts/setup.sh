# Sourced by demo.sh and test.sh: makes .venv once, with the versions of constraints.txt, and installs this checkout.
# Usage: setup_venv EXTRAS, e.g. setup_venv "[dev,crosscheck]" or setup_venv "".
setup_venv() {
    local python="${PYTHON:-python3}" wanted
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "fedlabel needs Python 3.11 or newer, and $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11." >&2; exit 2; }
    wanted="$(cat pyproject.toml constraints.txt | cksum) $1"
    if [ "$(cat .venv/.fedlabel-installed 2>/dev/null)" != "$wanted" ] && [ "$(cat .venv/.fedlabel-installed 2>/dev/null)" != "${wanted% *} [dev,crosscheck,privacy,docs]" ]; then
        echo "Installing into .venv (a few minutes the first time) ..."
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$1"
        echo "$wanted" >.venv/.fedlabel-installed
    else
        echo "Using .venv, which is up to date."
    fi
    # shellcheck disable=SC1091
    . .venv/bin/activate
}
