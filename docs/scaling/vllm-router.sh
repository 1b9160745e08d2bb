#!/bin/sh
# vllm-router in front of two servers: a conversation, by the header X-Session-Id, always to the same one.
#
#   pip install vllm-router
#   pyengine serve -m smol=model.safetensors --port 8081
#   pyengine serve -m smol=model.safetensors --port 8082
#   sh docs/scaling/vllm-router.sh
#
# It retries no request that such a conversation's server does not answer, and learns by /health that a server is lost, or
# drains: hence the short interval.
exec vllm-router --host 127.0.0.1 --port 8080 \
    --worker-urls http://127.0.0.1:8081 http://127.0.0.1:8082 \
    --policy consistent_hash \
    --health-check-interval-secs 2 --health-failure-threshold 1 \
    --prometheus-port 8079
