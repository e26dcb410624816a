# Sourced by the scripts beside it: makes .venv in the checkout, and keeps it while it is current.
#
#   use_environment launch|test|clients    leaves the interpreter's path in $VENV_PYTHON, and the working directory at the checkout
#
# Settings, from the environment:
#   PYTHON            the Python 3.11 to 3.13 to build with; found on PATH where unset
#   TORCH_INDEX_URL   where pip takes torch from. PyPI's torch for Linux carries CUDA (gigabytes); on a machine without a GPU
#                     https://download.pytorch.org/whl/cpu has a small one
#   PIP_*             pip's own, such as PIP_INDEX_URL

TORCH_VERSION=2.13.0
COMPOSER_VERSION=0.32.1

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$CHECKOUT/.venv
VENV_PYTHON=$VENV/bin/python
VENV_LOG=$CHECKOUT/.venv.log

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Whether $1 is a Python that the package supports and that can make virtual environments.
is_supported_python() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        is_supported_python "$PYTHON" || die "expected \$PYTHON to be a Python 3.11 to 3.13 with venv, got $PYTHON"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if is_supported_python "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "found no Python 3.11 to 3.13 with venv on PATH; install one (on Debian and Ubuntu python3-venv too)," \
        "or name it: PYTHON=/path/to/python3.12 $0"
}

# Runs a command with its output in the log; says what happened, with the log's end, if it fails.
logged() {
    printf '\n$ %s\n' "$*" >>"$VENV_LOG"
    if ! "$@" >>"$VENV_LOG" 2>&1; then
        tail -n 20 "$VENV_LOG" >&2
        die "'$*' failed; the lines above are the end of $VENV_LOG"
    fi
}

install() {
    say "installing $*"
    logged "$VENV_PYTHON" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@"
}

extras_of() {
    case $1 in
        launch) echo launch,fairscale,cpu ;;
        test) echo launch,fairscale,composer,test ;;
        clients) echo launch,fairscale,composer,test,stacks,clusters ;;
        *) return 1 ;;
    esac
}

# One environment serves every purpose: what is asked for is added to what is there.
use_environment() {
    local purpose=$1 stamp have='' python
    extras_of "$purpose" >/dev/null || die "expected launch, test or clients, got $purpose"
    cd "$CHECKOUT"

    # Two scripts started together must not install over each other.
    if command -v flock >/dev/null; then
        exec 9>"$CHECKOUT/.venv.lock"
        flock -n 9 || { say "waiting for another script that is setting up .venv"; flock 9; }
    fi

    # While installing, no stamp is there: an environment without one was interrupted, or is not of our making.
    if [[ -r $VENV/stamp ]]; then
        have=$(<"$VENV/stamp")
    fi
    stamp="$(cat pyproject.toml scripts/environment.sh | cksum) ${TORCH_INDEX_URL:-}"
    case $have in
        "$stamp clients" | "$stamp test" | "$stamp $purpose")
            [[ $purpose != clients || $have == *" clients" ]] || have=''
            if is_supported_python "$VENV_PYTHON"; then
                [[ -z ${PYTHON:-} ]] || same_python "$PYTHON" || have=''
            else
                have=''
            fi
            ;;
        *) have='' ;;
    esac

    if [[ -z $have ]]; then
        python=$(find_python)
        : >"$VENV_LOG"
        if [[ ! -r $VENV/stamp ]] || ! is_supported_python "$VENV_PYTHON" || ! same_python "$python"; then
            say "making .venv with $("$python" --version); pip's output goes to $VENV_LOG"
            logged "$python" -m venv --clear "$VENV"
        elif [[ $purpose == launch || $(<"$VENV/stamp") == *" clients" ]]; then
            purpose=$(<"$VENV/stamp") purpose=${purpose##* } # what is there already stays
        fi
        rm -f "$VENV/stamp"
        # torch first and alone, so that nothing else chooses its version or where it comes from.
        install "torch==$TORCH_VERSION" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
        install "torch==$TORCH_VERSION" numpy --editable ".[$(extras_of "$purpose")]"
        if [[ $purpose != launch ]]; then
            # It asks for a torch of its own time, and for torchvision, which tests/composer_client.py does without.
            install --no-deps "mosaicml==$COMPOSER_VERSION"
        fi
        logged "$VENV_PYTHON" -c 'import torch, sharded_dadamw'
        printf '%s %s\n' "$stamp" "$purpose" >"$VENV/stamp"
        say "set up in ${SECONDS}s"
    fi
    if command -v flock >/dev/null; then
        exec 9>&-
    fi
}

# Whether $1 is of the same minor version as the environment's Python.
same_python() {
    local version='import sys; print(sys.version_info[:2])'
    [[ $("$1" -c "$version" 2>&1) == $("$VENV_PYTHON" -c "$version" 2>&1) ]]
}
