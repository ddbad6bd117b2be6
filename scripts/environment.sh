# For `source`: install_into VENV REQUIREMENT... makes a virtual environment with this checkout's pinned versions.

install_into() {
    local venv=$1 python=${PYTHON:-python3} wanted
    shift
    wanted="$* $(cat requirements.txt pyproject.toml | cksum)"
    if [ "$(cat "$venv/installed" 2>/dev/null)" = "$wanted" ]; then return; fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed: set PYTHON to one" >&2
        return 1
    }
    echo "installing into $venv (a few minutes the first time)"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c requirements.txt --editable "$@"
    echo "$wanted" >"$venv/installed"
}
