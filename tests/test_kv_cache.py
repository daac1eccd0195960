"""The cache of keys and values: every token's logits are those without one, however it came in."""

from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygrad_llm import Tensor, no_grad
from tinygrad_llm.generate import Decoder, beam_search, generate
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.nn import KVCache, LayerCache, MultiHeadAttention, RotaryEmbedding
from tinygrad_llm.random import Generator

CONTEXT, VOCAB = 10, 13


def gpt(dtype="float64", **options):
    config = {"emb_dim": 12, "n_heads": 3, "n_layers": 2, "drop_rate": 0.5, "qkv_bias": True}
    cfg = GPTConfig(VOCAB, CONTEXT, **{**config, **options})
    model = GPT(cfg, Generator(0), init="torch")  # larger weights than GPT-2's: what is off, shows
    return model.to(dtype).eval()


MODEL = gpt()
lengths = st.lists(st.integers(1, CONTEXT), min_size=1, max_size=5).filter(
    lambda parts: sum(parts) <= CONTEXT
)
seeds = st.integers(0, 2**32 - 1)


def some_ids(seed, *shape):
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def chunks(ids, parts):
    """ids (B, T) cut along T."""
    return np.split(ids, np.cumsum(parts)[:-1], axis=1)


def close(found, expected, tolerance=1e-11):
    found, expected = (np.asarray(getattr(a, "data", a)) for a in (found, expected))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# --- the model ------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(parts=lengths, batch=st.integers(1, 3), seed=seeds)
def test_a_text_in_any_pieces_has_the_logits_of_the_whole(parts, batch, seed):
    ids = some_ids(seed, batch, sum(parts))
    with no_grad():
        cache = MODEL.new_cache(batch)
        pieces = [MODEL(piece, cache=cache).data for piece in chunks(ids, parts)]
        close(np.concatenate(pieces, axis=1), MODEL(ids))
    assert cache.length == sum(parts)


def test_in_float32_they_agree_to_its_rounding():
    model, ids = gpt("float32"), some_ids(0, 2, CONTEXT)
    with no_grad():
        cache = model.new_cache(2)
        pieces = [model(ids[:, t : t + 1], cache=cache).data for t in range(CONTEXT)]
        close(np.concatenate(pieces, axis=1), model(ids), 1e-6)


def test_nothing_is_allocated_anew_for_a_token():
    cache = MODEL.new_cache(1)
    arrays = [array for layer in cache.layers for array in (layer.keys, layer.values)]
    with no_grad():
        for t in range(CONTEXT):
            MODEL(some_ids(t, 1, 1), cache=cache)
    after = [array for layer in cache.layers for array in (layer.keys, layer.values)]
    assert all(a is b for a, b in zip(arrays, after, strict=True))


@given(keep=st.integers(0, 6), seed=seeds)
def test_what_is_truncated_is_forgotten(keep, seed):
    ids, others = some_ids(seed, 1, 6), some_ids(seed + 1, 1, 3)
    with no_grad():
        cache = MODEL.new_cache(1)
        MODEL(ids, cache=cache)
        cache.truncate(keep)
        cache.truncate(CONTEXT)  # nothing comes back
        close(
            MODEL(others, cache=cache),
            MODEL(np.concatenate([ids[:, :keep], others], axis=1)).data[:, keep:],
        )


@given(
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    padding=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    seed=seeds,
)
def test_rows_are_chosen(rows, padding, seed):
    ids, new = some_ids(seed, 3, 4), some_ids(seed + 1, len(rows), 2)
    with no_grad():
        cache = MODEL.new_cache(3, padding)
        MODEL(ids, cache=cache)
        cache.select(rows)
        found = MODEL(new, cache=cache).data
        for b, row in enumerate(rows):
            text = np.concatenate([ids[row, padding[row] :], new[b]])
            close(found[b], MODEL(text[None]).data[0, -2:])


@contextmanager
def interrupted(module):
    """Inside, Ctrl-C comes while the module computes."""

    def forward(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "forward", forward)
        yield


INTERRUPTED = {
    "the first block": MODEL.blocks[0].ff,
    "the last attention": MODEL.blocks[-1].att.out_proj,
    "the last feed-forward": MODEL.blocks[-1].ff,
    "the last norm": MODEL.final_norm,
    "the head": MODEL.out_head,
}


@pytest.mark.parametrize("where", INTERRUPTED)
def test_a_call_that_is_interrupted_adds_nothing(where):
    ids = some_ids(1, 1, 5)
    with no_grad():
        cache = MODEL.new_cache(1)
        MODEL(ids[:, :2], cache=cache)
        for _ in range(2):
            with interrupted(INTERRUPTED[where]):
                MODEL(ids[:, 2:4], cache=cache)
        assert cache.length == 2
        close(MODEL(ids[:, 2:], cache=cache), MODEL(ids).data[:, 2:])


# --- the attention --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("turned", [False, True])
@settings(max_examples=10)
@given(parts=lengths, seed=seeds)
def test_attention_in_any_pieces(n_kv_heads, window, turned, parts, seed):
    attention = MultiHeadAttention(
        6, 16, CONTEXT, 4, n_kv_heads=n_kv_heads, window=window, qkv_bias=True,
        rope=RotaryEmbedding(4, CONTEXT) if turned else None, generator=Generator(2),
    )  # fmt: skip
    attention.to("float64")
    x = np.random.default_rng(seed).standard_normal((2, sum(parts), 6))
    cache = LayerCache(2, n_kv_heads, CONTEXT, 4, np.float64)
    with no_grad():
        pieces = [attention(Tensor(piece), cache=cache).data for piece in chunks(x, parts)]
        close(np.concatenate(pieces, axis=1), attention(Tensor(x)))


def test_a_mask_is_over_all_keys():
    attention = MultiHeadAttention(6, 6, CONTEXT, 2, generator=Generator(2)).to("float64")
    x = np.random.default_rng(0).standard_normal((1, 5, 6))
    seen = np.random.default_rng(1).random((5, 5)) < 0.7
    cache = LayerCache(1, 2, CONTEXT, 3, np.float64)
    with no_grad():
        attention(Tensor(x[:, :3]), mask=Tensor(seen[:3, :3]), cache=cache)
        found = attention(Tensor(x[:, 3:]), mask=Tensor(seen[3:]), cache=cache)
        close(found, attention(Tensor(x), mask=Tensor(seen)).data[:, 3:])


# --- the decoder ----------------------------------------------------------------------------------


def last_logits(ids, model=MODEL):
    """Without a cache: what the decoder must give."""
    with no_grad():
        return model(np.asarray(ids)[:, -CONTEXT:]).data[:, -1]


@given(seed=seeds, batch=st.integers(1, 3), first=st.integers(1, CONTEXT + 3))
@settings(max_examples=20)
def test_every_token_has_the_logits_without_a_cache_past_the_context_too(seed, batch, first):
    ids, decoder = some_ids(seed, batch, 2 * CONTEXT + 3), Decoder(MODEL)
    for t in range(first, ids.shape[1] + 1):
        close(decoder(ids[:, :t]), last_logits(ids[:, :t]))


@given(seed=seeds, sizes=st.lists(st.integers(1, CONTEXT + 4), min_size=2, max_size=4))
@settings(max_examples=30)
def test_padded_rows_have_the_logits_that_they_have_alone(seed, sizes):
    rows, new = [some_ids(seed + i, n) for i, n in enumerate(sizes)], CONTEXT + 2
    following = some_ids(seed, len(sizes), new)
    padding = max(sizes) - np.array(sizes)
    ids = np.stack([np.pad(row, (p, 0)) for row, p in zip(rows, padding)])
    ids, decoder = np.concatenate([ids, following], axis=1), Decoder(MODEL)
    for t in range(max(sizes), ids.shape[1] + 1):
        found = decoder(ids[:, :t], padding)
        for b, p in enumerate(padding):
            close(found[b], last_logits(ids[b : b + 1, p:t])[0])


@given(st.data())
@settings(max_examples=30)
def test_one_decoder_for_many_texts(data):
    """Few different ids and the same model: beginnings are shared often, and by chance, too."""
    decoder = Decoder(MODEL)
    for _ in range(6):
        rows, T = data.draw(st.integers(1, 2)), data.draw(st.integers(1, CONTEXT + 3))
        row = st.lists(st.integers(0, 1), min_size=T, max_size=T)
        ids = np.array(data.draw(st.lists(row, min_size=rows, max_size=rows)))
        pads = st.lists(st.integers(0, T - 1), min_size=rows, max_size=rows)
        padding = np.array(data.draw(pads))
        found = decoder(ids, padding)
        for b, p in enumerate(padding):
            close(found[b], last_logits(ids[b : b + 1, p:])[0])


@pytest.mark.parametrize("where", INTERRUPTED)
def test_a_decoder_that_was_interrupted_mixes_no_texts(where):
    decoder = Decoder(MODEL)
    decoder(np.array([[1, 2, 3, 4, 5, 6]]))
    with interrupted(INTERRUPTED[where]):
        decoder(np.array([[1, 2, 9, 9, 9, 9]]))
    for text in ([1, 2, 3, 4, 5, 7], [1, 2, 9, 9, 9, 9]):
        close(decoder(np.array([text])), last_logits([text]))


def test_only_what_is_new_is_computed(monkeypatch):
    computed = []
    hidden_states = type(MODEL).hidden_states

    def spy(self, ids, *rest, **keywords):
        computed.append(np.shape(ids)[1])
        return hidden_states(self, ids, *rest, **keywords)

    monkeypatch.setattr(type(MODEL), "hidden_states", spy)
    decoder = Decoder(MODEL)
    decoder(np.array([[1, 2, 3, 4]]))
    decoder(np.array([[1, 2, 3, 4, 5]]))
    decoder(np.array([[1, 2, 3, 4, 5]]))  # the same again: its last token, for the logits
    decoder(np.array([[1, 2, 7, 4, 5]]))
    assert computed == [4, 1, 1, 3]
    computed.clear()
    ids = generate(MODEL, [1, 2, 3], CONTEXT, temperature=0)
    full = ids.shape[1] - 1 - CONTEXT  # tokens that were chosen when the context was full already
    assert computed == [3] + [1] * (CONTEXT - 3) + [CONTEXT] * full
    computed.clear()
    beam_search(MODEL, [1, 2, 3], 5, beams=4)  # whose rows change places
    assert computed == [3, 1, 1, 1, 1]


def test_of_a_long_prompt_the_head_sees_the_last_token_only():
    seen = []

    class Head(type(MODEL.out_head)):
        def forward(self, x):
            seen.append(x.shape)
            return super().forward(x)

    model = gpt()
    model.out_head.__class__ = Head
    generate(model, some_ids(0, 2, 8), 1)
    assert seen == [(2, 12)]


# --- what is wrong --------------------------------------------------------------------------------


def refused(error, says, call):
    with pytest.raises(error, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused():
    ids = some_ids(0, 1, 4)
    with no_grad():
        cache = MODEL.new_cache(1)
        MODEL(some_ids(0, 1, 7), cache=cache)
        says = (
            r"ids of shape \(1, 4\) after the 7 in the cache exceed context_length 10; fill a new"
        )
        refused(ValueError, says, lambda: MODEL(ids, cache=cache))
        assert cache.length == 7
        says = "segments and a cache exclude each other"
        refused(ValueError, says, lambda: MODEL(ids, np.zeros((1, 4), int), MODEL.new_cache(1)))
        says = r"KVCache: keys of shape \(1, 3, 4, 4\) do not fit; expected \(2, 3, 'T', 4\)"
        refused(ValueError, says, lambda: MODEL(ids, cache=MODEL.new_cache(2)))
        blind = MultiHeadAttention(6, 6, 9, 2, causal=False)
        x = Tensor(np.zeros((1, 3, 6)))
        refused(ValueError, "needs causal", lambda: blind(x, cache=LayerCache(1, 2, 9, 3)))
        seeing = MultiHeadAttention(6, 6, 9, 2)
        says = "KVCache: 3 tokens exceed context_length 2"
        refused(ValueError, says, lambda: seeing(x, cache=LayerCache(1, 2, 2, 3)))
    refused(RuntimeError, r"inside no_grad\(\)", lambda: MODEL(ids, cache=MODEL.new_cache(1)))
    refused(
        ValueError,
        r"padding has shape \(3,\), expected \(2,\)",
        lambda: MODEL.new_cache(2, [0] * 3),
    )
    refused(ValueError, "batch is a positive integer, not 0", lambda: KVCache(1, 0, 1, 1, 1))
