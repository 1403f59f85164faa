#!/bin/sh
# Install what the tests run against: Debian packages for programs that are missing, then the
# servers of tests/servers/install.py in the user's cache. Prints nothing when all goes well.
set -eu
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}

have() { command -v "$1" >/dev/null 2>&1; }

missing_packages() {
    ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || have initdb || echo postgresql
    have node || echo nodejs
    have npm || echo npm
    have gnome-keyring-daemon || echo gnome-keyring
    { have dbus-daemon && have dbus-send; } || echo dbus
    have strace || echo strace
    have faketime || echo faketime
    { have slapd || [ -x /usr/sbin/slapd ]; } || echo slapd
    have ldapwhoami || echo ldap-utils
    { echo '#include <stdio.h>' | cc -E -; } >/dev/null 2>&1 || echo gcc libc6-dev
    have musl-gcc || echo musl-tools
    have curl || echo curl
    have git || echo git
    have fish || echo fish
    have zsh || echo zsh
    have man || echo man-db
    have mandoc || echo mandoc
    have chromium || echo chromium
    have systemd-nspawn || echo systemd-container
    have mmdebstrap || echo mmdebstrap
    [ -e /usr/lib/systemd/user/dbus.socket ] || echo dbus-user-session
    have chromedriver || echo chromium-driver
    have unshare || echo util-linux
    { [ -x /usr/sbin/nginx ] && [ -e /usr/lib/nginx/modules/ngx_http_modsecurity_module.so ]; } ||
        echo nginx libnginx-mod-http-modsecurity
    [ -d /usr/share/modsecurity-crs/rules ] || echo modsecurity-crs
}

missing=$(missing_packages | tr '\n' ' ')
if [ -n "$missing" ]; then
    if ! have apt-get; then
        echo "tests/setup.sh: install first: $missing" >&2
        exit 1
    elif [ "$(id -u)" = 0 ]; then
        root=
    elif sudo -n true 2>/dev/null; then
        root="sudo -n"
    else
        echo "tests/setup.sh: type first: sudo apt-get install -y --no-install-recommends $missing" >&2
        exit 1
    fi
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    # Whether the programs are there is what counts: the status is also that of servers that the
    # packages of postgresql and nginx try to start, and which the tests do not use.
    {
        $root apt-get update
        # a server of the system's own is not wanted
        echo slapd slapd/no_configuration boolean true | $root debconf-set-selections
        # shellcheck disable=SC2086 # a list of words
        $root env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y --no-install-recommends $missing
    } >"$log" 2>&1 </dev/null || true
    if [ -n "$(missing_packages)" ]; then
        cat "$log" >&2
        exit 1
    fi
fi

exec "$python" -m tests.servers.install
