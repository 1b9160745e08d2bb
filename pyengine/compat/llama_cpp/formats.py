"""Chat formats by llama-cpp-python's names, as templates, and the strings that end an answer in each."""

from __future__ import annotations

from typing import NamedTuple

from pyengine.arguments import shown
from pyengine.errors import InvalidArgumentError

OWN = "chat_template.default"  # the model's own


class ChatFormat(NamedTuple):
    template: str
    stop: tuple[str, ...] = ()


_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CHATML_TOOLS = (  # the newline after a block is no part of what it writes
    "{% if tools %}<|im_start|>system\nYou have access to the following functions:\n"
    "{% for tool in tools %}\n\nfunctions.{{ tool['function']['name'] }}:\n{{ tool['function']['parameters'] | tojson }}\n"
    "{% endfor %}"
    '\n\nAnswer with one call: {"name": the function, "arguments": its arguments}.<|im_end|>\n{% endif %}'
)
_LLAMA_2 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ bos_token }}[INST] <<SYS>>\n{{ message['content'] }}\n<</SYS>>\n\n"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }} {{ eos_token }}"
    "{% elif loop.index0 > 0 and messages[loop.index0 - 1]['role'] == 'system' %}{{ message['content'] }} [/INST]"
    "{% else %}{{ bos_token }}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)
_LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)
_GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else 'user' }}\n{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

FORMATS = {
    "chatml": ChatFormat(_CHATML, ("<|im_end|>",)),
    "chatml-function-calling": ChatFormat(_CHATML_TOOLS + _CHATML, ("<|im_end|>",)),
    "llama-2": ChatFormat(_LLAMA_2),
    "llama-3": ChatFormat(_LLAMA_3, ("<|eot_id|>",)),
    "mistral-instruct": ChatFormat(_MISTRAL),
    "gemma": ChatFormat(_GEMMA, ("<end_of_turn>",)),
    "zephyr": ChatFormat(_ZEPHYR),
}


def chat_format(name: str) -> ChatFormat:
    """Raises InvalidArgumentError with the names that there are."""
    if not isinstance(name, str) or name not in FORMATS:
        known = ", ".join([OWN, *FORMATS])
        raise InvalidArgumentError(f"chat_format={shown(name)} is not supported; there are: {known}")
    return FORMATS[name]
