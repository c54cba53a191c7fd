#!/usr/bin/env bash
# From a fresh clone to trained, measured and merged adapters:  bash launch/quickstart.sh [my.txt ...]
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment run
exec "$venv/bin/peftune" quickstart "$@"
