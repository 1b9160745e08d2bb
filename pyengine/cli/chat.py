"""`pyengine chat`: a conversation on the terminal, or line by line through a pipe; with a question its answer."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from pyengine.cli import EXIT_INTERRUPTED, options, terminal
from pyengine.errors import ContextFullError, MissingFileError, TemplateError

if TYPE_CHECKING:
    from pyengine.engine import Engine
    from pyengine.results import Generation
    from pyengine.sampling import SamplingParams

EPILOG = f"""\
commands in the conversation:
  /reset    forget everything but the system prompt
  /help     this list
  /exit     leave (so does Ctrl-D)
Ctrl-C stops the answer; at the prompt it drops the line, and twice in a row it leaves.
A line that ends with \\ goes on in the next.

examples:
  pyengine chat -m model.safetensors
  pyengine chat -m model.safetensors "Why is the sky blue?"
  pyengine chat -m model.safetensors -sys "Answer in one sentence." --temp 0.7
  printf 'Hello!\\nAnd again.\\n' | pyengine chat -m model.safetensors --temp 0

{options.ENVIRONMENT}"""

HELP = """\
/reset  forget everything but the system prompt
/help   this list
/exit   leave (so does Ctrl-D)
Ctrl-C stops an answer; twice in a row at the prompt it leaves.
A line that ends with \\ goes on in the next."""


def parser() -> argparse.ArgumentParser:
    parser = options.Parser("chat", EPILOG)
    options.add_prompt_options(parser, "a question: it is answered, and that is all; without one a conversation begins")
    parser.add_argument("-sys", "--system", "--system-prompt", metavar="TEXT", help="system prompt")
    parser.add_argument("-v", "--verbose", action="store_true", help="timings on stderr after each answer")
    options.add_model_options(parser)
    options.add_lora_option(parser, "an adapter (LoRA, PEFT's directory) beside the model; its product is multiplied by SCALE")
    options.add_context_options(parser)
    options.add_prompt_cache_option(
        parser, "what was computed of the system prompt: read from FILE if it is there, else written there; changes no answer"
    )
    options.add_sampling_options(parser)
    return parser


class Conversation:
    """The messages so far, and how an answer joins them."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None, adapter: str | None = None) -> None:
        self._engine = engine
        self._adapter = adapter
        self._params = params
        self._system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def answer(self, text: str) -> Generation | None:
        """Say `text`, write the answer to stdout as it comes. Returns None if Ctrl-C stopped it; what had come stays in the
        conversation. Raises ContextFullError, with the conversation as it was before."""
        said: list[str] = []
        result = None
        turn = [*self.messages, {"role": "user", "content": text}]
        pieces = self._engine.chat(turn, self._params, stream=True, adapter=self._adapter)
        with contextlib.suppress(KeyboardInterrupt):
            for piece in pieces:
                said.append(piece.text)
                terminal.write(piece.text)
                result = piece.result
                if result is not None:
                    break  # the stream ends with `pieces`, after our newline: it may have a warning to show
        answer = "".join(said)
        if not answer.endswith("\n"):
            terminal.write("\n")
        self.messages = [*turn, {"role": "assistant", "content": answer}]
        return result


class Lines:
    """What the user types: with editing and history on a terminal, plain lines otherwise."""

    def __init__(self) -> None:
        self._input = options.stdin()
        self.is_terminal = self._input.isatty()
        self._edits = self.is_terminal and sys.stdout.isatty()
        if self._edits:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() edits lines once this is imported)

    def next(self) -> str | None:
        """The next line, without its newline; None at the end of input. On a terminal a line that ends with a backslash goes on
        in the next one, and the text has both."""
        line = self._line("> ")
        while line is not None and self.is_terminal and line.endswith("\\"):
            more = self._line(". ")
            line = line[:-1] if more is None else f"{line[:-1]}\n{more}"
        return line

    def _line(self, prompt: str) -> str | None:
        if self._edits:
            try:
                return input(prompt)
            except EOFError:
                print()
                return None
        if self.is_terminal:  # stdout goes elsewhere, and gets only what the model says
            print(prompt, end="", file=sys.stderr, flush=True)
        line = self._input.readline()
        return line.removeprefix("\ufeff").rstrip("\n") if line else None


COMMANDS = ("/reset", "/help", "/exit")


def command(line: str, conversation: Conversation) -> bool:
    """Obey a line that begins with a slash; whether to go on."""
    if line == "/exit":
        return False
    if line == "/reset":
        conversation.reset()
    elif line == "/help":
        print(HELP, file=sys.stderr)
    else:
        terminal.warn(f"there is no command {line.split()[0]}; /help lists them")
    return True


def say(line: str, conversation: Conversation, engine: Engine, *, verbose: bool) -> Generation | None:
    """One turn. Returns None if Ctrl-C ended it, raises ContextFullError."""
    from pyengine.cli.generate import timings_line

    result = conversation.answer(line)
    if verbose and result is not None:
        terminal.warn(timings_line(result, engine))
    return result


def converse(conversation: Conversation, lines: Lines, engine: Engine, verbose: bool) -> int:
    """The loop. On a terminal a full context is told and the conversation stays. Returns the exit code."""
    from pyengine.cli.errors import sentence

    n_interrupts = 0
    while True:
        try:
            line = lines.next()
            n_interrupts = 0
            if line is None:
                return 0
            line = line.strip()
            # Through a pipe comes what people ask, and a path is a question too.
            if line in COMMANDS or (line.startswith("/") and lines.is_terminal):
                if not command(line, conversation):
                    return 0
            elif line:
                say(line, conversation, engine, verbose=verbose)
        except ContextFullError as error:
            if not lines.is_terminal:
                raise
            terminal.warn(f"pyengine: error: {sentence(error)}; /reset starts anew")
        except KeyboardInterrupt:  # at the prompt: an answer handles its own
            n_interrupts += 1
            if n_interrupts == 2 or not lines.is_terminal:
                print(file=sys.stderr)
                return EXIT_INTERRUPTED
            print("\n(Ctrl-C again leaves)", file=sys.stderr)


def check_template(engine: Engine, model: str | None) -> None:
    """A model without a chat template is refused now and not after the first question. Raises TemplateError."""
    try:
        _ = engine.chat_template
    except TemplateError:
        if model is not None:
            raise
        raise TemplateError(
            "the model in the package tells stories and was not made to talk: name another one with -m, or use generate"
        ) from None


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    params = options.sampling_params(args)
    question = options.read_prompt(args)
    if args.system is not None:
        options.checked_text(args.system, "the system prompt")
    options.tolerant_stdout()
    if question is None and hasattr(stdin := options.stdin(), "reconfigure"):
        stdin.reconfigure(errors="replace")
    with options.open_engine(args) as engine:
        check_template(engine, options.model_name(args))
        adapter = None if args.lora is None else args.lora.load(engine)
        if options.load_prompt_cache(args, engine):
            if args.system is None:
                raise MissingFileError("--prompt-cache: there is no such file, and no system prompt (--system) to be kept in it")
            system = [{"role": "system", "content": args.system}]
            engine.save_prefix(engine.chat_ids(system, add_generation_prompt=False), args.prompt_cache)
        conversation = Conversation(engine, params, args.system, adapter)
        if question is not None:
            return EXIT_INTERRUPTED if say(question, conversation, engine, verbose=args.verbose) is None else 0
        lines = Lines()
        if lines.is_terminal:
            terminal.warn(f"{engine.metadata.get('name') or engine.path.name}; /help lists the commands")
        return converse(conversation, lines, engine, args.verbose)
