#!/bin/sh
# Runs a training command again until it is finished: launch/restart.sh dist-ae train ae --run-dir runs/ae
#   75 (stopped, a checkpoint is saved): again at once. 2 (a mistake in the command or its input): gives up.
#   anything else (a lost host, a full disk): again after 1, 2, 4 … seconds, at most TRIES times in all (8).
wait=1 tries=${TRIES:-8}
while :; do
  "$@"; status=$?
  case $status in
    0 | 2) exit "$status" ;;
    75) continue ;;
  esac
  tries=$((tries - 1))
  [ "$tries" -gt 0 ] || exit "$status"
  echo "restart.sh: status $status; again in $wait s" >&2
  sleep "$wait"
  wait=$((wait * 2))
done
