# Functions of the launch scripts, which source this file.
# shellcheck shell=bash

set -euo pipefail

DRY_RUN=${DRY_RUN:-0}

# Runs a command; with --dry-run, prints it instead, quoted for a shell.
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

# Prints the value of --name=value.
value() { echo "${1#*=}"; }

# Fails if program $1 is missing; $2 says how to get it.
need() {
  [ "$DRY_RUN" = 1 ] || command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}

# The command that the scripts run with the flags after --: training, or writing the feature cache for it.
module=train
check_module() {
  case $module in
    train | cache) ;;
    *) fail "--module=$module is neither train nor cache" ;;
  esac
}
