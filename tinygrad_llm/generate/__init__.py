"""Text from a GPT, one token at a time: the last logits, a choice among them, and round again.

loop.py       generate continues a batch of prompts, stream yields the tokens of one as they come
sampling.py   which token is chosen: temperature, top-k, top-p, min-p, repetition penalty
beam.py       beam_search: the likeliest continuations, not a random one
decoder.py    the last logits, with what was computed before kept in a cache
device.py     the same on a GPU: a static cache, and a step that is recorded once
text.py       ids as text while they arrive, up to a stop string
"""

from .beam import Beam, beam_search
from .decoder import Decoder
from .device import evaluating
from .loop import generate, stream
from .sampling import Sampler, min_p, repetition_penalty, temperature, top_k, top_p
from .text import StopStrings, stream_text

__all__ = [
    "Beam",
    "Decoder",
    "Sampler",
    "StopStrings",
    "beam_search",
    "evaluating",
    "generate",
    "min_p",
    "repetition_penalty",
    "stream",
    "stream_text",
    "temperature",
    "top_k",
    "top_p",
]
