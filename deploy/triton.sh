#!/bin/sh
# Starts Triton on $MODEL_REPOSITORY (/models). Arguments are handed on to Triton: TLS, tracing, keepalive.
set -eu

# Loading models, mapping shared memory, tracing and changing the log require the header `admin-key: $ADMIN_KEY` (over
# gRPC `triton-grpc-protocol-admin-key`). Without ADMIN_KEY a random key is used and not printed. HTTP and gRPC are
# restricted each on its own.
key="${ADMIN_KEY:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"
admin="model-repository,shared-memory,trace,logging:admin-key=$key"
unset ADMIN_KEY

# What one graph gives to another on a GPU lies in a pool, by default of 64 MiB: that is some ten pictures of a ViT-B with three
# coupled heads. Beyond it goes over the bus to the host and back. Only the native backends use it (serve/repository/native.py).
models="${MODEL_REPOSITORY:-/models}"
configs=$(cat "$models"/*/config.pbtxt 2>/dev/null || true)
native=""
if printf '%s\n' "$configs" | grep -Eq '^backend: "(onnxruntime|tensorrt)"'; then
    for gpu in $(printf '%s\n' "$configs" | sed -n 's/^  gpus: \([0-9]*\)$/\1/p' | sort -un); do
        native="$native --cuda-memory-pool-byte-size=$gpu:${CUDA_POOL_BYTES:-1073741824}"
    done
fi
# An engine that any TensorRT runs brings code of its own, which TensorRT only runs if it is told to.
if printf '%s\n' "$configs" | grep -q '^  key: "version_compatible"'; then
    native="$native --backend-config=tensorrt,version-compatible=true"
fi

# shellcheck disable=SC2086  # $native is several words
# Auto-complete would guess batch sizes. After SIGTERM accepted requests have 30 s; a dead backend takes all of them.
exec "${TRITONSERVER:-/opt/tritonserver/bin/tritonserver}" \
    --model-repository="$models" \
    --disable-auto-complete-config \
    --strict-readiness=true \
    --exit-on-error=true \
    --exit-timeout-secs=30 \
    --grpc-port=8001 \
    --http-port=8000 \
    --metrics-port=8002 \
    --grpc-restricted-protocol="$admin" \
    --http-restricted-api="$admin" \
    --log-format=ISO8601 \
    $native \
    "$@"
