"""A model class for lm-evaluation-harness, which is registered as "pyengine" when this module is imported.

    python -m pyengine.eval.lm_eval --model pyengine --model_args pretrained=model.safetensors --tasks hellaswag,lambada_openai

Needs the extra pyengine-lm[eval]. `pretrained` is what -m takes; other model_args are Engine's options. Special tokens that
a task's texts spell are special tokens, as in the harness's own classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from pyengine.engine import Engine
from pyengine.errors import InvalidArgumentError
from pyengine.eval.likelihood import Pair, encode_pair, likelihoods

DEFAULT_LENGTH = 256  # tokens of an answer whose task says nothing, as in the harness


@register_model("pyengine")
class PyEngineLM(LM):  # type: ignore[misc]
    """pretrained: a model as Engine takes it, None = the one in the package, or an Engine. batch_size, max_batch_size and device
    are accepted and not used: the scheduler makes its own batches."""

    def __init__(
        self,
        pretrained: str | Engine | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.engine = pretrained if isinstance(pretrained, Engine) else Engine(pretrained, **options)

    # ------------------------------------------------------------ likelihoods

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is it greedy) of each (context, continuation)."""
        pairs = [encode_pair(self.engine, *request.args, parse_special=True) for request in requests]
        with _Progress("loglikelihood", disable_tqdm) as progress:
            scored = likelihoods(self.engine, pairs, progress)
        return self._remember("loglikelihood", requests, [(one.logprob, one.is_greedy) for one in scored])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, in windows of the whole context that do not overlap in what they score."""
        pairs: list[Pair] = []
        counts = []
        for request in requests:
            windows = list(map(make_disjoint_window, self._windows(request.args[0])))
            pairs += [Pair(context, continuation) for context, continuation in windows]
            counts.append(len(windows))
        with _Progress("loglikelihood_rolling", disable_tqdm) as progress:
            scored = iter(likelihoods(self.engine, pairs, progress))
        sums = [sum(next(scored).logprob for _ in range(count)) for count in counts]
        return self._remember("loglikelihood_rolling", requests, sums)

    def _windows(self, text: str) -> Any:
        ids = self.engine.tokenize(text, add_bos=False, parse_special=True)
        prefix = encode_pair(self.engine, "", "a").context[0]
        return get_rolling_token_windows(
            token_list=ids, prefix_token=prefix, max_seq_len=self.engine.n_ctx, context_len=1
        )

    # ------------------------------------------------------------ text

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each (context, options). Options are the harness's (until, max_gen_toks, do_sample, temperature)
        or SamplingParams'; a context that does not fit loses its beginning."""
        texts: list[str | None] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        with _Progress("generate_until", disable_tqdm) as progress:
            for indices in groups.values():
                options = generation_options(requests[indices[0]].args[1])
                room = max(1, self.engine.n_ctx - options["max_tokens"])
                prompts = [self.engine.tokenize(requests[i].args[0], parse_special=True)[-room:] for i in indices]
                for i, result in zip(indices, self.engine.generate(prompts, **options), strict=True):
                    texts[i] = result.text
                progress(sum(text is not None for text in texts), len(texts))
        return self._remember("generate_until", requests, texts)

    def _remember(self, kind: str, requests: Sequence[Instance], answers: Sequence[Any]) -> list[Any]:
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return list(answers)

    # ------------------------------------------------------------ chats

    @property
    def tokenizer_name(self) -> str:
        """What cached requests are named after."""
        return self.engine.metadata.get("name", "pyengine").replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.engine.chat_template.source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text, by the model's template, without BOS, which every context gets."""
        text = self.engine.chat_template.render(chat_history, add_generation_prompt=add_generation_prompt)
        bos = self.engine.tokenizer.bos_id
        spelled = None if bos is None else self.engine.tokenizer.token_text(bos)
        return text.removeprefix(spelled) if spelled and self.engine.tokenizer.adds_bos else text


def generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """SamplingParams' names for the harness's. Raises InvalidArgumentError, UnknownParameterError."""
    options = dict(given)
    stop = options.pop("until", None) or ()
    limits = [options.pop(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in options]
    if len(limits) > 1:
        raise InvalidArgumentError("max_gen_toks, max_new_tokens and max_tokens are the same: give one of them")
    samples = options.pop("do_sample", None)
    if samples is False or (samples is None and not options.get("temperature")):
        options["temperature"] = 0.0
    stops = (stop,) if isinstance(stop, str) else tuple(one for one in stop if one)
    return {**options, "stop": stops, "max_tokens": limits[0] if limits else DEFAULT_LENGTH}


class _Progress:
    """A bar of the harness's kind, as a callback."""

    def __init__(self, label: str, disable: bool) -> None:
        self._bar = tqdm(desc=label, disable=disable)

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> Callable[[int, int], None]:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
