#!/usr/bin/env bash
# Several processes on this machine that share fake CPU devices, to try out a run of many hosts.
#
#   launch/local.sh --processes=4 --devices=8 -- --config=configs/shapes.py --workdir=runs/four --config.mesh.fsdp=4 --config.mesh.tensor=2

source "$(dirname "$0")/common.sh"
usage="usage: launch/local.sh [--dry-run] [--module=train|cache] [--processes=N] [--devices=M] [--port=P] -- FLAGS"

processes=4 devices=4 port=9876
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --module=*) module=$(value "$1") ;;
    --processes=*) processes=$(value "$1") ;;
    --devices=*) devices=$(value "$1") ;;
    --port=*) port=$(value "$1") ;;
    --help) echo "$usage"; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown flag $1; $usage" ;;
  esac
  shift
done
check_module
[ $# -gt 0 ] || fail "no flags after --; $usage"
for number in "$processes" "$devices"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "--processes and --devices must be whole numbers of at least 1, not '$number'"
done
[ $((devices % processes)) = 0 ] || fail "--devices=$devices must be a multiple of --processes=$processes"

export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$((devices / processes))"
started=()
trap '[ ${#started[@]} = 0 ] || kill "${started[@]}" 2>/dev/null || true' EXIT TERM
trap ':' INT # the terminal sends it to the processes too: they save
for ((i = 0; i < processes; i++)); do
  command=(python -m "pisces_jax.$module" "$@" "--coordinator=127.0.0.1:$port" "--processes=$processes" "--process=$i")
  if [ "$DRY_RUN" = 1 ]; then
    run "${command[@]}"
  else
    "${command[@]}" &
    started+=($!)
  fi
done
# When one has ended badly the others do so too, unless they have not met: then they wait for it, and are ended here.
status=0 patience=15
while [ ${#started[@]} -gt 0 ]; do
  alive=()
  for process in "${started[@]}"; do
    if kill -0 "$process" 2>/dev/null; then
      alive+=("$process")
    else
      code=0
      wait "$process" || code=$?
      [ "$status" != 0 ] || status=$code # the first to end badly knows why
    fi
  done
  started=("${alive[@]}")
  [ ${#started[@]} -gt 0 ] || break
  [ "$status" = 0 ] || [ $((patience--)) -gt 0 ] || kill -KILL "${started[@]}" 2>/dev/null || true
  sleep 1 || true
done
exit "$status"
