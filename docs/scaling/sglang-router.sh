#!/bin/sh
# sglang-router in front of two servers: each request to the one that has seen most of its text, as far as their loads allow.
#
#   pip install sglang-router
#   pyengine serve -m smol=model.safetensors --port 8081
#   pyengine serve -m smol=model.safetensors --port 8082
#   sh docs/scaling/sglang-router.sh
#
# It knows chats and text completions; to /v1/responses it adds store = true, which is what is done anyway.
exec python -m sglang_router.launch_router --host 127.0.0.1 --port 8080 \
    --worker-urls http://127.0.0.1:8081 http://127.0.0.1:8082 \
    --policy cache_aware \
    --health-check-interval-secs 2 --health-failure-threshold 1 \
    --prometheus-port 8079
