#!/usr/bin/env bash
# Cloud TPU VMs by queued resources: requests a slice, waits for it, installs the package and trains on all its hosts.
#
#   launch/tpu_vm.sh --name=pisces --zone=us-central2-b --type=v4-128 --runtime=tpu-ubuntu2204-base \
#       --repository=https://github.com/ME/pisces_jax --flags=tpu -- --config=configs/text_8b.py --workdir=/mnt/runs
#   launch/tpu_vm.sh --name=pisces --zone=us-central2-b --delete
#
# --workdir is a folder that all hosts share, such as a mounted bucket. --slices=N requests N slices. --spot requests
# pre-emptible machines: when they were pre-empted, run with --delete and then the same command again to continue.

source "$(dirname "$0")/common.sh"
usage="usage: launch/tpu_vm.sh [--dry-run] [--module=train|cache] --name=N --zone=Z (--type=T --repository=URL [--runtime=R] [--project=P] [--slices=N] [--spot] [--flags=G,G] -- FLAGS | --delete)"

name='' zone='' type='' runtime=tpu-ubuntu2204-base repository='' project='' slices=1 spot=0 delete=0 groups=tpu
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --module=*) module=$(value "$1") ;;
    --name=*) name=$(value "$1") ;;
    --zone=*) zone=$(value "$1") ;;
    --type=*) type=$(value "$1") ;;
    --runtime=*) runtime=$(value "$1") ;;
    --repository=*) repository=$(value "$1") ;;
    --project=*) project=$(value "$1") ;;
    --slices=*) slices=$(value "$1") ;;
    --flags=*) groups=$(value "$1") ;;
    --spot) spot=1 ;;
    --delete) delete=1 ;;
    --help) echo "$usage"; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown flag $1; $usage" ;;
  esac
  shift
done
if [ -z "$name" ] || [ -z "$zone" ]; then fail "--name and --zone are missing; $usage"; fi
check_module
need gcloud "https://cloud.google.com/sdk/docs/install"
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")
queued=(gcloud compute tpus queued-resources)

if [ "$delete" = 1 ]; then
  run "${queued[@]}" delete "$name" "${where[@]}" --force --quiet
  exit
fi
if [ -z "$type" ] || [ -z "$repository" ]; then fail "--type and --repository are missing; $usage"; fi
[ $# -gt 0 ] || fail "no flags after --; $usage"

ask=("${queued[@]}" create "$name" "${where[@]}" "--accelerator-type=$type" "--runtime-version=$runtime")
[ "$spot" = 0 ] || ask+=(--spot)
if [ "$slices" = 1 ]; then
  ask+=("--node-id=$name")
  nodes=("$name")
else
  ask+=("--node-count=$slices" "--node-prefix=$name")
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi
if [ "$DRY_RUN" = 1 ] || ! "${queued[@]}" describe "$name" "${where[@]}" >/dev/null 2>&1; then
  run "${ask[@]}"
fi
state=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" "--format=value(state.state)")
if [ "$DRY_RUN" = 1 ]; then
  run "${state[@]}"
else
  until [ "$("${state[@]}")" = ACTIVE ]; do
    case $("${state[@]}") in
      FAILED | SUSPENDED) fail "the request ended as $("${state[@]}"): remove it with --delete and run this again" ;;
    esac
    sleep 30
  done
fi

printf -v training '%q ' "$@"
remote="set -e; test -d pisces_jax || git clone --depth=1 $repository pisces_jax; cd pisces_jax; git pull -q --ff-only"
# The Python of the machines may be too old: uv installs one.
remote+="; test -d .venv || { python3 -m pip install -q --user uv; python3 -m uv venv -q --seed --python=3.12 .venv; }"
remote+="; .venv/bin/pip install -q -e '.[tpu]' -c constraints.txt"
remote+="; export LIBTPU_INIT_ARGS=\"\$(.venv/bin/python -m pisces_jax.xla_flags ${groups//,/ })\""
remote+="; .venv/bin/python -m pisces_jax.$module $training"
started=()
for node in "${nodes[@]}"; do
  command=(gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all "--command=$remote")
  if [ "$DRY_RUN" = 1 ]; then
    run "${command[@]}"
  else
    "${command[@]}" &
    started+=($!)
  fi
done
status=0
for process in "${started[@]}"; do
  wait "$process" || status=$?
done
exit "$status"
