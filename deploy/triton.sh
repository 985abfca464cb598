#!/bin/sh
# Starts Triton on $MODEL_REPOSITORY (/models). Arguments are handed on to Triton: TLS, tracing, keepalive.
set -eu

# Loading models, mapping shared memory, tracing and changing the log require the header `admin-key: $ADMIN_KEY` (over
# gRPC `triton-grpc-protocol-admin-key`). Without ADMIN_KEY a random key is used and not printed. HTTP and gRPC are
# restricted each on its own.
key="${ADMIN_KEY:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"
admin="model-repository,shared-memory,trace,logging:admin-key=$key"
unset ADMIN_KEY

# Auto-complete would guess batch sizes. After SIGTERM accepted requests have 30 s; a dead backend takes all of them.
exec "${TRITONSERVER:-/opt/tritonserver/bin/tritonserver}" \
    --model-repository="${MODEL_REPOSITORY:-/models}" \
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
    "$@"
