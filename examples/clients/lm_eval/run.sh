#!/bin/sh
# LM evaluation harness, its local-completions: pip install 'lm-eval[api]'; sh run.sh
#
# Two small tasks that stand beside this file: one chooses among answers by their log-likelihood (echo and logprobs of
# /v1/completions), one generates. The tokenizer is asked of the server, which needs --enable-tokenizer-info-endpoint.
set -eu
cd "$(dirname "$0")"
export OPENAI_API_KEY="${KEY:-example}" HF_DATASETS_OFFLINE=1 HF_HUB_OFFLINE=1
base="${BASE_URL:-http://127.0.0.1:8000/v1}"
exec "${LM_EVAL:-lm_eval}" run --model local-completions --include_path . --tasks sums_choice,sums_generate \
    --model_args "model=${MODEL:-minnow},base_url=$base/completions,num_concurrent=4,max_retries=1,tokenizer_backend=remote,auth_token=$OPENAI_API_KEY"
