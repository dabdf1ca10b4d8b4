#!/bin/sh
# Starts Redis for a lab: one user, `netassay`, who may do what a lab needs (users.acl) and nothing else; nobody else
# gets in. Arguments go to redis-server.
#
# REDIS_PASSWORD        of the user netassay; required
# REDIS_ADMIN_PASSWORD  if set, there is a second user, `admin`, who may do everything; for people
set -eu
: "${REDIS_PASSWORD:?set it to the password of the user netassay}"
here=$(cd "$(dirname "$0")" && pwd)

# Only digests are written down, in a file that nobody else may read and that goes with the container.
digest() { printf %s "$1" | sha256sum | cut -d ' ' -f 1; }
umask 077
users=$(mktemp "${TMPDIR:-/tmp}/users.XXXXXX")
sed "s/@PASSWORD_SHA256@/$(digest "$REDIS_PASSWORD")/" "$here/users.acl" |
    awk '/^ *#/ { next } /^user/ && begun++ { printf "\n" } { printf "%s ", $0 } END { print "" }' > "$users"
if [ -n "${REDIS_ADMIN_PASSWORD:-}" ]; then
    printf 'user admin on #%s ~* &* +@all\n' "$(digest "$REDIS_ADMIN_PASSWORD")" >> "$users"
fi
unset REDIS_PASSWORD REDIS_ADMIN_PASSWORD
exec redis-server "$here/redis.conf" --aclfile "$users" "$@"
