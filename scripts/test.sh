#!/usr/bin/env bash
# Run the tests:  bash scripts/test.sh [--all] [pytest arguments]
#   --all   also the slow proofs (marker "slow")
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

arguments=()
for argument in "$@"; do
    # The last -m wins over the "not slow" of pyproject.toml.
    if [ "$argument" = --all ]; then arguments+=(-m "slow or not slow"); else arguments+=("$argument"); fi
done
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 # no test touches a hub
exec python -m pytest "${arguments[@]}"
