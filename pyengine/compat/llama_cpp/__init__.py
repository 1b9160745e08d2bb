"""llama-cpp-python's high-level interface.

    from pyengine.compat.llama_cpp import Llama  # was: from llama_cpp import Llama
    llm = Llama(model_path="model.gguf")
    print(llm("Q: Name the planets in the solar system? A: ", max_tokens=32, stop=["Q:", "\\n"], echo=True))

docs/migrating.md says what is the same, what differs and what is refused.
"""

from pyengine.compat.llama_cpp.callables import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from pyengine.compat.llama_cpp.grammar import LlamaGrammar
from pyengine.compat.llama_cpp.llama import Llama

__all__ = [
    "Llama",
    "LlamaGrammar",
    "LogitsProcessor",
    "LogitsProcessorList",
    "StoppingCriteria",
    "StoppingCriteriaList",
]
