# Sourced by the other scripts: puts the project's own virtual environment on the PATH, making it if need be.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

prism_venv() {
    local stamp want
    stamp=.venv/prism-installed
    want=$(cat pyproject.toml constraints.txt | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
        echo "installing into .venv (once; a minute or two)" >&2
        # torch first and by its pin: a resolver that chooses freely takes gigabytes of other builds
        .venv/bin/python -m pip install --quiet --constraint constraints.txt "$(grep '^torch==' constraints.txt)"
        .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
        echo "$want" >"$stamp"
    fi
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
}
