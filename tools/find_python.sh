#!/bin/sh
# Prints the first Python that really runs, is >= 3.12 and < 3.14, and can make virtual environments.
#
# A name on the PATH proves little: `python3` may be older, and `python3.12` may be a pyenv shim that fails
# when it is run. So every candidate is asked. PYTHON=... names the one to take; if that one is not fit,
# it is an error, never a reason to take another. Exit code 2 where there is none.
set -u

# Answers "VERSION fit", "VERSION venv" (fit, but unable to make environments) or "VERSION unfit".
# A free-threaded build (3.13t) is unfit: torch and Megatron-Core publish no wheels for it.
question='
import sys, sysconfig
fit = (3, 12) <= sys.version_info[:2] < (3, 14) and not sysconfig.get_config_var("Py_GIL_DISABLED")
try:
    import ensurepip, venv
    answer = "fit"
except ImportError:
    answer = "venv"
print("%d.%d.%d" % sys.version_info[:3], answer if fit else "unfit")
'

ask() {
    "$1" -c "$question" </dev/null 2>/dev/null
}

fail() {
    printf 'btx-megatron: %s\n' "$*" >&2
    exit 2
}

if [ -n "${PYTHON:-}" ]; then
    path=$(command -v "$PYTHON") || fail "PYTHON=$PYTHON: no such program; name a Python >= 3.12, < 3.14."
    answer=$(ask "$path") || fail "PYTHON=$PYTHON does not run; name a Python >= 3.12, < 3.14."
    case $answer in
        *" fit") printf '%s\n' "$path" && exit 0 ;;
        *" venv") fail "PYTHON=$PYTHON (${answer% *}) cannot make virtual environments;" \
            "on Debian and Ubuntu: apt install python${answer%.*}-venv" ;;
        *) fail "PYTHON=$PYTHON is Python ${answer% *}; name one that is >= 3.12, < 3.14." ;;
    esac
fi

without_venv=
seen=
for candidate in python3.12 python3.13 python3 \
    "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[23]*/bin/python; do
    path=$(command -v "$candidate") || continue
    answer=$(ask "$path") || { seen="$seen $path (does not run)"; continue; }
    case $answer in
        *" fit") printf '%s\n' "$path" && exit 0 ;;
        *" venv") without_venv=${without_venv:-${answer%.*}} ;;
    esac
    seen="$seen $path (${answer% *})"
done

if [ -n "$without_venv" ]; then
    fail "Python $without_venv is here, but it cannot make virtual environments." \
        "On Debian and Ubuntu: apt install python$without_venv-venv"
fi
fail "no Python >= 3.12, < 3.14 found; tried:${seen:- nothing runs}." \
    "Install one (Debian 13 and Ubuntu 24.04 have it: apt install python3 python3-venv;" \
    "older systems: pyenv install 3.12), or name one you have: make PYTHON=/path/to/python3.12 ..."
