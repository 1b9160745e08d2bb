"""What people type who come from llama.cpp, vLLM or ollama, and what does it here. Imported when somebody has typed it."""

from __future__ import annotations

from collections.abc import Mapping

_NO_GPU = "the engine computes on CPUs; leave it out"
_ALWAYS = "that is always so; leave it out"
_BY_ITSELF = "the engine chooses by itself; leave it out"
_NO_SUCH_SAMPLER = "there is no such sampler here; 'pyengine generate --help' lists those that there are"
_OF_A_REQUEST = "'pyengine generate' and 'chat' take it, and requests to 'pyengine serve' say it themselves"

# Commands of others -> the end of a sentence that begins "there is no command X; ".
COMMANDS: dict[str, str] = {
    **dict.fromkeys(
        ("run", "complete", "completion", "cli"),
        "'pyengine chat -m MODEL' talks with a model, 'pyengine generate -m MODEL PROMPT' continues a text",
    ),
    **dict.fromkeys(("pull", "download"), "'-m hf:ORG/NAME' fetches a model when it is first used"),
    **dict.fromkeys(("list", "ls", "ps", "rm"), "'pyengine models' lists what is kept of models, and removes it"),
    "show": "'pyengine info MODEL' shows what is in a model",
    **dict.fromkeys(("convert", "create", "quantize"), "'pyengine freeze SOURCE -o OUT' makes a model file"),
    **dict.fromkeys(("perplexity", "ppl"), "'pyengine eval -m MODEL FILE' measures perplexity"),
    **dict.fromkeys(("server", "start"), "'pyengine serve' is the server"),
    "embedding": "'pyengine embed' is the command",
    "version": "'pyengine --version' tells it, and 'pyengine doctor' those of what it is built on",
    "tokenize": "'pyengine serve' has a path for it, and in Python an Engine has a method",
}

# Options of others -> the end of a sentence that begins "there is no option X: ". None of them is an option of the command that
# it was typed for: those that are never come here.
OPTIONS: dict[str, str] = {
    **dict.fromkeys(("-hf", "-hfr", "--hf-repo"), "use -m hf:ORG/NAME"),
    **dict.fromkeys(("-md", "--model-draft", "--speculative-config", "--speculative-model"), "use --draft-model"),
    **dict.fromkeys(("-ngl", "--n-gpu-layers", "--gpu-layers", "--gpu-memory-utilization"), _NO_GPU),
    **dict.fromkeys(("--tensor-parallel-size", "-sm", "--split-mode", "-ts", "--tensor-split"), _NO_GPU),
    **dict.fromkeys(("-fa", "--flash-attn", "-cb", "--cont-batching", "--enable-prefix-caching", "--jinja"), _ALWAYS),
    **dict.fromkeys(("-ub", "--ubatch-size", "-b", "--batch-size", "--numa", "--mlock", "--no-mmap"), _BY_ITSELF),
    **dict.fromkeys(("-tb", "--threads-batch"), "-t is for prompts and outputs; leave it out"),
    **dict.fromkeys(("-ctk", "-ctv", "--cache-type-k", "--cache-type-v"), "use --kv-dtype, which is for both"),
    **dict.fromkeys(("-cnv", "--conversation"), "'pyengine chat' is a conversation; leave it out"),
    **dict.fromkeys(("-no-cnv", "--no-conversation"), "'pyengine generate' continues a text; leave it out"),
    **dict.fromkeys(("-st", "--single-turn"), "'pyengine chat QUESTION' answers one question; leave it out"),
    **dict.fromkeys(("-sys", "--system", "--system-prompt"), "system prompts are for 'pyengine chat'"),
    **dict.fromkeys(("-r", "--reverse-prompt"), "use --stop"),
    **dict.fromkeys(("-j",), "use --json-schema"),
    **dict.fromkeys(("-jf", "--json-schema-file"), "use --json-schema @FILE"),
    "--grammar-file": "use --grammar @FILE",
    "--lora-scaled": "use --lora DIR:SCALE, a directory of PEFT's",
    **dict.fromkeys(("--num-beams", "--beam-size", "--beam-width", "--use-beam-search"), "use --beams of 'pyengine generate'"),
    "--num-return-sequences": "'pyengine generate --beams N --json' has all of them",
    "--infill": "give the text behind the hole with --suffix",
    "--in-prefix": "use --prompt",
    "--in-suffix": "use --suffix",
    "--spm-infill": "a code model's own order is used; leave it out",
    "--max-model-len": "use --ctx-size",
    "--max-new-tokens": "use --max-tokens",
    "--log-disable": "nothing is logged; leave it out",
}

SERVER_OPTIONS: dict[str, str] = {
    **OPTIONS,
    "--api-key": "keys are taken from PYENGINE_API_KEY or --api-key-file, where other users of the machine do not see them",
    **dict.fromkeys(("-a", "--alias", "--served-model-name"), "give a name with -m NAME=PATH"),
    "--enable-lora": "--lora NAME=DIR is enough; leave it out",
    "--lora-modules": "use --lora NAME=DIR, once for each adapter",
    **dict.fromkeys(("-np", "--max-num-seqs"), "use --parallel"),
    **dict.fromkeys(("--enable-auto-tool-choice", "--metrics"), _ALWAYS),
    **dict.fromkeys(("--embedding", "--embeddings", "--rerank", "--reranking"), _ALWAYS),
    "--tool-call-parser": "the format of calls is read from the chat template; leave it out",
}

_OTHER_SAMPLERS = ("--mirostat",)
_SAMPLERS = ("--dry-", "--xtc-", "--dynatemp-", "--top-nsigma", "--top-n-sigma", "--repeat-last-n")


def meaning(option: str, options: Mapping[str, str]) -> str | None:
    """What does here what `option` does elsewhere; None if nobody has such an option."""
    if option.startswith(_OTHER_SAMPLERS):
        return _NO_SUCH_SAMPLER
    if option.startswith(_SAMPLERS):
        return _OF_A_REQUEST
    return options.get(option)
