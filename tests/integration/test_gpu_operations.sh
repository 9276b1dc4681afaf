#!/usr/bin/env bash
# The comparison of operations that tests/gpu/run makes on a GPU, with the kernels on the CPU.
. tests/integration/common

for mode in "" --bf16; do
    # shellcheck disable=SC2086 # no argument where there is none
    expect 0 '^kernels on the CPU.* tensors within their tolerance$' "${B:-build}/host/compare_ops" --small $mode
done
