#!/usr/bin/env bash
# Every planted fault (tests/faults/faults.py) is caught by the tests of the model.
exec "$PYTHON" tests/faults/run
