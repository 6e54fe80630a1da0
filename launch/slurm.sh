#!/usr/bin/env bash
# SLURM with GPUs: one process per GPU; JAX finds the processes by SLURM's variables.
#
#   launch/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 --python=.venv/bin/python -- \
#       --config=configs/text_8b.py --workdir=/shared/runs
#
# A job that SLURM requeues, after a node failure or pre-emption, continues by itself. Two minutes before the time limit,
# the job gets SIGTERM, saves a checkpoint and is requeued; so it is when it was stuck or lost a process (docs/launch.md).

source "$(dirname "$0")/common.sh"
usage="usage: launch/slurm.sh [--dry-run] [--module=train|cache] --nodes=N --gpus=G [--time=T] [--partition=P] [--account=A] [--python=PY] -- FLAGS"

nodes='' gpus='' time=24:00:00 partition='' account='' python=python
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --module=*) module=$(value "$1") ;;
    --nodes=*) nodes=$(value "$1") ;;
    --gpus=*) gpus=$(value "$1") ;;
    --time=*) time=$(value "$1") ;;
    --partition=*) partition=$(value "$1") ;;
    --account=*) account=$(value "$1") ;;
    --python=*) python=$(value "$1") ;;
    --help) echo "$usage"; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown flag $1; $usage" ;;
  esac
  shift
done
if [ -z "$nodes" ] || [ -z "$gpus" ]; then fail "--nodes and --gpus are missing; $usage"; fi
[ $# -gt 0 ] || fail "no flags after --; $usage"
check_module
need sbatch "run this on a login node of the cluster"

printf -v training '%q ' "$@"
options=("--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" "--time=$time" --requeue
  --signal=TERM@120 --job-name=pisces --output=slurm-%j.log)
[ -z "$partition" ] || options+=("--partition=$partition")
[ -z "$account" ] || options+=("--account=$account")
run sbatch "${options[@]}" \
  "--wrap=export XLA_FLAGS=\"\$($python -m pisces_jax.xla_flags gpu)\"; srun --kill-on-bad-exit=1 $python -m pisces_jax.$module $training || { status=\$?; [ \$status -lt 75 ] || [ \$status -gt 77 ] || scontrol requeue \$SLURM_JOB_ID; exit \$status; }"
