#!/usr/bin/env bash
# GKE with xpk: builds and pushes the image, and starts a workload on TPU slices of a cluster.
#
#   launch/gke.sh --cluster=pods --zone=us-east5-a --project=P --type=v5p-128 --image=REGION-docker.pkg.dev/P/R/pisces \
#       --workload=stage1 -- --config=configs/text_8b.py --workdir=/gcs/runs

source "$(dirname "$0")/common.sh"
usage="usage: launch/gke.sh [--dry-run] [--module=train|cache] --cluster=C --zone=Z --project=P --type=T --image=I --workload=W [--slices=N] [--flags=G,G] -- FLAGS"

cluster='' zone='' project='' type='' image='' workload='' slices=1 groups=tpu
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --module=*) module=$(value "$1") ;;
    --cluster=*) cluster=$(value "$1") ;;
    --zone=*) zone=$(value "$1") ;;
    --project=*) project=$(value "$1") ;;
    --type=*) type=$(value "$1") ;;
    --image=*) image=$(value "$1") ;;
    --workload=*) workload=$(value "$1") ;;
    --slices=*) slices=$(value "$1") ;;
    --flags=*) groups=$(value "$1") ;;
    --help) echo "$usage"; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown flag $1; $usage" ;;
  esac
  shift
done
for name in cluster zone project type image workload; do
  [ -n "${!name}" ] || fail "--$name is missing; $usage"
done
[ $# -gt 0 ] || fail "no flags after --; $usage"
check_module
need docker "https://docs.docker.com/engine/install"
need xpk "pip install xpk"

printf -v training '%q ' "$@"
here=$(cd "$(dirname "$0")/.." && pwd)
run docker build --file "$here/launch/Dockerfile" --build-arg EXTRA=tpu --tag "$image" "$here"
run docker push "$image"
run xpk workload create "--cluster=$cluster" "--zone=$zone" "--project=$project" "--workload=$workload" \
  "--tpu-type=$type" "--num-slices=$slices" "--docker-image=$image" \
  "--command=LIBTPU_INIT_ARGS=\"\$(python -m pisces_jax.xla_flags ${groups//,/ })\" python -m pisces_jax.$module $training"
