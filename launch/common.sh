# What the launch scripts share; sourced by them.
# shellcheck shell=bash

set -euo pipefail

DRY_RUN=${DRY_RUN:-0}

# Runs a command, or with --dry-run prints it as it would be typed.
run() {
  if [ "$DRY_RUN" = 1 ]; then
    local quoted
    printf -v quoted '%q ' "$@"
    echo "${quoted% }"
  else
    "$@"
  fi
}

fail() {
  echo "error: $*" >&2
  exit 1
}

# The value of --name=value.
value() { echo "${1#*=}"; }

need() {
  [ "$DRY_RUN" = 1 ] || command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}

# What the scripts start, with the flags behind --: a training, or the cache of features that it reads.
module=train
check_module() {
  case $module in
    train | cache) ;;
    *) fail "--module=$module is neither train nor cache" ;;
  esac
}
