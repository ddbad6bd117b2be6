# For `source`: install_into VENV WHAT makes a virtual environment with this checkout, its pinned versions, and WHAT
# (`.` or `.[extra]`). What is installed already is not installed again.

install_into() {
    local venv=$1 what=$2 python=${PYTHON:-python3} stamp pins
    stamp="$venv/installed_${what//[^a-z]/}"
    pins=$(cat requirements.txt pyproject.toml | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$pins" ]; then return; fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed: set PYTHON to one" >&2
        return 1
    }
    echo "installing $what into $venv (a few minutes the first time)"
    "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c requirements.txt --editable "$what"
    echo "$pins" >"$stamp"
}
