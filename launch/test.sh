#!/usr/bin/env bash
# Run the tests: ./launch/test.sh [pytest arguments]     slow ones: ./launch/test.sh -m slow
# Makes the environment on first use. Relative paths in the arguments are relative to the checkout.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

exec "$RUN_PYTHON" -m pytest "$@"
