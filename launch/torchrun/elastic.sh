#!/bin/sh
# Hosts that come and go. On each of them the same command, with what `dist-ae train` takes:
#   MAIN=10.0.0.1 HOSTS=1:2 launch/torchrun/elastic.sh vae --run-dir /shared/runs/vae
#
#   MAIN       address of the host that keeps the list of who is there; this one must stay. PORT of that list (29400)
#   HOSTS      fewest:most hosts, or one number
#   PROCESSES  of this host; left out, one a GPU. PYTHON: of the environment that dist-ae is in (python3)
#   RESTARTS   how many failures this host survives (100); hosts that join do not count
#   TIMEOUT    seconds to wait for the fewest hosts (600). LAST_CALL: then for more of them (30)
#
# A host is lost: the others begin again from the last checkpoint, with the processes that are left. A host comes, or
# comes back: all save, and begin again together. Ctrl-C and SIGTERM save and end this host's processes.
set -eu
die() { echo "elastic.sh: $1" >&2; exit 2; }
[ $# -gt 0 ] || die "usage: MAIN=ADDRESS HOSTS=MIN:MAX $0 PRESET [OPTION ...]"
[ -n "${MAIN:-}" ] && [ -n "${HOSTS:-}" ] || die "set MAIN, an address of the first host, and HOSTS, such as 1:2"
main=$(getent ahosts "$MAIN" | awk 'NR == 1 { print $1 }')
[ -n "$main" ] || die "MAIN=$MAIN: no address of that name"
case $HOSTS:$main in
  1:127.*) ;; # one host alone
  *:127.*) die "MAIN=$MAIN is this host's loopback ($main), which other hosts cannot reach; give an address" ;;
esac
# torchrun would compare MAIN with this host's name, and announce that name: with Debian's /etc/hosts, 127.0.1.1.
route=$(ip -o route get "$main") || die "MAIN=$MAIN cannot be reached from here"
case $route in
  local*) is_host=true ;;
  *) is_host=false ;;
esac
here=$(echo "$route" | sed -n 's/.* src \([^ ]*\).*/\1/p')
wait=${TIMEOUT:-600}
echo "elastic.sh: $(hostname) ($here) waits at $main:${PORT:-29400} for $HOSTS hosts, at most $wait s"

# Of its own accord torchrun gives the processes of every restart the same store. They find the addresses of the
# processes before them in it: "Connection refused" (pytorch issues 135712, 167288).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-python3}" "$(dirname "$0")/../interruptible.py" torchrun \
  --nnodes "$HOSTS" --nproc-per-node "${PROCESSES:-gpu}" --max-restarts "${RESTARTS:-100}" \
  --rdzv-backend c10d --rdzv-id "${JOB:-dist-ae}" --rdzv-endpoint "$main:${PORT:-29400}" --local-addr "$here" \
  --rdzv-conf "is_host=$is_host,join_timeout=$wait,read_timeout=$wait,last_call_timeout=${LAST_CALL:-30}" \
  -m dist_ae train "$@"
