# To be sourced by the other scripts: who runs them, and what for.

# Begin again by sudo, where that is needed and there. It clears the environment: what is for
# crtrace, the tests, pip and apt is handed on.
as_root() {
    ((EUID != 0)) && command -v sudo >/dev/null || return 0
    local ours='CI|CRTRACE_.*|PIP_.*|BCC_KERNEL_SOURCE|NO_COLOR|(https?|no)_proxy|(HTTPS?|NO)_PROXY'
    local kept
    kept=$(compgen -e | grep -xE "$ours" | paste -sd, -) || true
    exec sudo ${kept:+"--preserve-env=$kept"} -- "$@"
}

# Whether all that is asked for is help. What follows "--" is for somebody else.
asks_for_help() {
    local word
    for word in "$@"; do
        case $word in
            --) return 1 ;;
            -h | --help) return 0 ;;
        esac
    done
    return 1
}

# Set up what a script in Python needs, and become it, as root: run_as_root SET FILE [ARGUMENT...].
# PYTHONPATH: targets and the handshake with them are those of the tests.
run_as_root() {
    local self tree set=$1 file=$2
    shift 2
    self=$(readlink -f "$0")
    tree=$(dirname "$(dirname "$self")")
    asks_for_help "$@" || as_root "$self" "$@"
    "$tree/scripts/setup" "$set" >&2
    PYTHONPATH=$tree exec "$tree/.venv/bin/python" -P "$tree/scripts/$file" "$@"
}
