"""Fields that ask for what is done anyway, as clients and routers write them unasked; and what is said where they ask for more.

A router reads a request into a structure of its own and sends on all of it, its defaults included: sglang-router and vllm-router
add SGLang's fields and vLLM's to every chat. Clients of llama.cpp's server do likewise.
"""

from __future__ import annotations

from pyengine.serve.fields import (
    ANYTHING,
    BOOLEAN,
    NUMBER,
    STRING,
    Table,
    hint,
    integer,
    list_of,
    map_of,
    one_of,
    refused,
)

_STORED = refused("only responses are stored", False)
_TIERS = refused("there is one tier", "auto", "default")
_TEXT_ONLY = "this server answers with text"

# OpenAI's, of chats and responses
OPENAI: Table = {
    "service_tier": _TIERS,
    "moderation": refused("this server does not moderate"),
    # what is computed of a prompt is kept without being told to, and where there are several servers a router reads these
    "prompt_cache_key": hint(STRING),
    "prompt_cache_retention": hint(STRING),
    "prompt_cache_options": hint(map_of(ANYTHING)),
}

# OpenAI's, of chats
CHAT: Table = {
    **OPENAI,
    "store": _STORED,
    "metadata": hint(map_of(STRING)),  # labels of what is stored
    "functions": refused("use tools", []),
    "function_call": refused("use tool_choice", "none", "auto"),
    "modalities": refused(_TEXT_ONLY, ["text"]),
    "audio": refused(_TEXT_ONLY),
    "prediction": hint(map_of(ANYTHING)),  # it may hasten an answer, and changes none
    "verbosity": refused("verbosity cannot be chosen", "medium"),
    "web_search_options": refused("this server does not search"),
}

# OpenAI's, of text completions
COMPLETIONS: Table = {
    "best_of": refused("samples are not ranked; use n", 1),
    "store": _STORED,
}

# OpenAI's, of responses
VACUOUS = one_of(  # of items that no answer here has
    "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "code_interpreter_call.outputs", "computer_call_output.output.image_url", "message.input_image.image_url",
)  # fmt: skip
RESPONSES: Table = {
    **OPENAI,
    "include": hint(list_of(VACUOUS)),
    "max_tool_calls": refused("tools are called by whoever reads the answer"),
    "n": refused("a response has one output", 1),
    "conversation": refused("there are no conversations but those of previous_response_id"),
    "context_management": refused("conversations are not cut", []),
    "truncation": refused("conversations are not cut", "disabled"),
    "background": refused("answers come with their request", False),
    "background_options": refused("answers come with their request", {}),
    "prompt": refused("there are no stored prompts"),
    "image": refused(_TEXT_ONLY),
    "access_programs": refused("there are no access programs"),
    "top_logprobs": refused("use /v1/chat/completions for log-probabilities", 0),
    "stream_options": refused("events are not padded", {}, {"include_obfuscation": False}),
}

# vLLM's, SGLang's and llama.cpp's, of chats and text completions
OTHERS: Table = {
    "spaces_between_special_tokens": refused("a text is its tokens' bytes", True),
    "return_token_ids": refused("use /tokenize", False),
    "return_tokens_as_token_ids": refused("use /tokenize", False),
    "priority": refused("requests have no priorities", 0),
    "request_id": hint(STRING),  # the header x-request-id is the one that comes back
    "no_stop_trim": refused("use include_stop_str_in_output", False),
    "return_hidden_states": refused("use /v1/embeddings", False),
    "cache_prompt": hint(BOOLEAN),  # a cached beginning changes no byte of an answer
    "id_slot": refused("there are no slots", -1),
    "timings_per_token": refused("timings come at the end", False),
    "return_progress": refused("there is no report of progress", False),
    "guided_json": refused("use structured_outputs.json"),
    "guided_regex": refused("use structured_outputs.regex"),
    "guided_choice": refused("use structured_outputs.choice"),
    "guided_grammar": refused("use structured_outputs.grammar"),
    "lora": refused("an adapter is asked for by its name, as model", []),
    "lora_path": refused("an adapter is asked for by its name, as model"),
    "n_predict": refused("use max_tokens", -1),
    "mirostat": refused("there is no mirostat", 0),
    "dry_range": refused("use dry_penalty_last_n, where 0 is off and -1 is the whole text", 0),  # whose default it is
}

# of these, what only chats have; what a model writes of its reasoning is part of its text
OTHERS_CHAT: Table = {
    **OTHERS,
    "add_special_tokens": refused("the chat template says which", False),
    "echo": refused("the last message is not repeated", False),
    "include_reasoning": refused("reasoning is part of the text", True),
    "separate_reasoning": hint(BOOLEAN),
    "stream_reasoning": refused("reasoning is part of the text", True),
    "reasoning_format": refused("reasoning is part of the text", "none", "auto"),
}

# llama.cpp's, of fillings: what editors send beside the texts
INFILL: Table = {
    **{name: kind for name, kind in OTHERS.items() if name != "n_predict"},
    "n": refused("a filling is one text; /v1/completions takes suffix and n", 1),
    "n_cmpl": refused("a filling is one text; /v1/completions takes suffix and n", 1),
    "n_probs": refused("/v1/completions takes suffix and logprobs", 0),
    "return_tokens": refused("use /tokenize", False),
    "id_slot": hint(integer(-1)),  # any sequence finds what is cached
    "samplers": hint(ANYTHING),  # in which order: there is one
    "n_indent": hint(integer(0)),
    "t_max_prompt_ms": hint(NUMBER),  # a client that waits no longer hangs up, and its work ends
    "t_max_predict_ms": hint(NUMBER),
    "n_cache_reuse": hint(integer(0)),
}
