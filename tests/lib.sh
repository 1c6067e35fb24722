# What the test scripts share: how they report, and how they find what they need. Sourced from the root of the project.

target=${CARGO_TARGET_DIR:-$PWD/target}
export afterimage=$target/release/afterimage

ok() { echo "ok - $*"; }
fail() { echo "not ok - $*"; }
skip() { echo "skip - $*"; }

# check NAME COMMAND…: one test.
check() {
    local name=$1
    shift
    if "$@"; then ok "$name"; else fail "$name"; return 1; fi
}

# Installs what is missing of these Debian packages; skips (false) where that is not possible.
packages() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    # One at a time: parts are played beside each other.
    local lock
    exec {lock}>"$target/apt.lock" && flock "$lock"
    # Not to be held by what an installation starts.
    install_missing "${missing[@]}" {lock}>&-
    local status=$?
    exec {lock}>&-
    return $status
}

install_missing() {
    # An old list of packages is the usual reason for a failure.
    install_packages "$@" >"$target/apt.log" 2>&1 ||
        { privileged apt-get update && install_packages "$@"; } >"$target/apt.log" 2>&1 || {
            skip "needs $* (apt-get says why in $target/apt.log)"
            return 1
        }
}

privileged() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}

install_packages() {
    local companion=() version
    # QEMU's parts are of one version: beside a newer qemu-utils, apt-get would rather remove that than go back.
    if [[ " $* " == *" qemu-system-x86 "* ]] && dpkg-query -W qemu-utils >/dev/null; then
        version=$(LC_ALL=C apt-cache policy qemu-system-x86 | awk '/Candidate:/ { print $2 }')
        [ "$version" = "$(dpkg-query -W -f '${Version}' qemu-utils)" ] ||
            companion=(--allow-downgrades "qemu-utils=$version")
    fi
    privileged env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" "${companion[@]}"
}

# wait_for SECONDS COMMAND…: until it succeeds.
wait_for() {
    local until=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $until ] || { echo "not within the time: $*" >&2; return 1; }
        sleep 0.1
    done
}
