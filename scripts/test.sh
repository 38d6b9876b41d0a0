#!/usr/bin/env bash
# Run the tests:  bash scripts/test.sh [--fast | --all] [pytest arguments]
#   --fast  without those that train, start ranks or build a huge model (marker "heavy"): five minutes on two cores
#   --all   also the slow proofs (marker "slow")
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

arguments=()
for argument in "$@"; do
    # The last -m wins over the "not slow" of pyproject.toml.
    case $argument in
        --fast) arguments+=(-m "not slow and not heavy") ;;
        --all) arguments+=(-m "slow or not slow") ;;
        *) arguments+=("$argument") ;;
    esac
done
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 # no test touches a hub
# Files side by side: most tests wait for one core. What a file's tests share is made once, since it stays together.
exec python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile "${arguments[@]}"
