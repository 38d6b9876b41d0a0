# Source this file: it makes .venv from requirements.lock when it is missing or stale, and activates it.
#   SKIP_ENV=1   use the python that is on the PATH (a container that has everything)
#   VENV=DIR     put the environment there instead of .venv
# Needs Python >= 3.12 and pip. uv (installed with pip when missing) does the installing.

_find_python() {
    local candidate
    for candidate in python3.12 python3 python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23]*/bin/python3; do
        # Run it: a pyenv shim exists for versions that are not active.
        if "$candidate" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    cat >&2 <<'MESSAGE'
env.sh: no Python 3.12 or 3.13 found (megatron-core 0.19.2 needs >= 3.12).
Tried python3.12, python3, python3.13 and pyenv's versions. Get one with one of
    sudo apt-get install python3.12 python3.12-venv      (Ubuntu 24.04)
    pyenv install 3.12
    uv python install 3.12                               (then put it on the PATH)
or, in a container that has every package already, set SKIP_ENV=1.
MESSAGE
    return 1
}

_make_env() {
    local root=$1 venv=$2 stamp=$3 python uv
    python=$(_find_python) || return
    echo "env.sh: making ${venv#"$root"/} from requirements.lock with $("$python" --version)" >&2
    rm -f "$venv/.stamp"
    # --without-pip: uv installs; an interpreter without ensurepip (Debian) works too.
    "$python" -m venv --clear --without-pip "$venv" || return
    uv=$(command -v uv) || {
        "$python" -m pip install --quiet --target "$venv/uv" uv || return
        uv=$venv/uv/bin/uv
    }
    "$uv" pip install --quiet --python "$venv/bin/python" --require-hashes -r "$root/requirements.lock" || return
    # compat: a plain path, so that a folder named tests/data can't hide the package data.
    "$uv" pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation \
        --config-settings editable_mode=compat -e "$root" || return
    echo "$stamp" >"$venv/.stamp"
}

_enter_env() {
    [ "${SKIP_ENV:-0}" = 1 ] && return 0
    local root venv stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return
    venv=${VENV:-$root/.venv}
    # The path is in the stamp: a copied or moved checkout must not import from the old one.
    stamp=$(cat "$root/requirements.lock" "$root/pyproject.toml" <(echo "$root") | sha256sum)
    # One maker at a time: several launchers may start together on a fresh machine.
    if [ "$(cat "$venv/.stamp" 2>/dev/null)" != "$stamp" ]; then
        (
            flock 9
            [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$stamp" ] || _make_env "$root" "$venv" "$stamp"
        ) 9>"$root/.env.lock" || return
    fi
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
}

_enter_env || { echo "env.sh: no environment; see the message above" >&2; return 1 2>/dev/null || exit 1; }
