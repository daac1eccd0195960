"""Generation on a GPU: the same tokens as on the CPU, by a step that is recorded once.

The device is "interpret". What does not depend on it, which of the texts' tokens are computed and
where they go, is tried many times with the same classes on NumPy's arrays.
"""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad_llm.kernels.gpu import decode, graph
from tinygrad_llm.kernels.gpu.driver import INTERPRETED
from tinygrad_llm.kernels.gpu.simulated import DeviceArray

from tinygrad_llm import Tensor, backend, no_grad
from tinygrad_llm.generate import Decoder, beam_search, generate, stream
from tinygrad_llm.generate.device import DeviceTexts
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.nn import Module, MultiHeadAttention, RotaryEmbedding, StaticCache
from tinygrad_llm.nn.cache import FEW_QUERIES
from tinygrad_llm.random import Generator

interpreted = pytest.mark.skipif(not INTERPRETED, reason="for TRITON_INTERPRET=1")
CONTEXT, VOCAB = 24, 13


def gpt(context_length=CONTEXT, n_layers=2, seed=1):
    cfg = GPTConfig(VOCAB, context_length, 16, 2, n_layers, drop_rate=0.5, tie_weights=False)
    return GPT(cfg, Generator(seed), init="torch")


EXACT = gpt().to("float64")
SMALL = gpt(12, 1, seed=7)  # whose greedy texts do not repeat one token


@pytest.fixture(scope="module")
def small():
    """SMALL on the device."""
    return copy.deepcopy(SMALL).to("interpret")


@pytest.fixture
def recordings(monkeypatch):
    """The graphs that are made. No kernel may refuse what it is given."""
    made = []

    class Counted(graph.Graph):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(graph, "Graph", Counted)
    backend.refusals.clear()
    yield made
    assert not backend.refusals


def some_ids(seed, *shape):
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def last_logits(ids, model=EXACT):
    """Without a cache: what a Decoder must give."""
    with no_grad():
        return model.eval()(np.asarray(ids)[:, -model.cfg.context_length :]).data[:, -1]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


# --- the cache, on NumPy's arrays -----------------------------------------------------------------


@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_rows_grow_in_pieces_of_different_lengths(data, seed):
    """Rows are given as many tokens each time, of which some are none; pieces may be long."""
    ids, cache, counts = some_ids(seed, 2, CONTEXT), EXACT.new_static_cache(2), np.zeros(2, int)
    EXACT.eval()
    with no_grad():
        whole = [[EXACT(row[None, :n]).data[0, -1] for n in range(1, CONTEXT + 1)] for row in ids]
        while room := CONTEXT - counts.max():
            T = data.draw(st.integers(1, room))
            new = np.array([T, data.draw(st.integers(0, T))])
            piece = np.stack([np.resize(row[n : n + T], T) for row, n in zip(ids, counts)])
            logits = EXACT(piece, cache=cache).data  # (2, T, V)
            for b, (n, m) in enumerate(zip(counts, new)):
                close(logits[b, :m], np.reshape(whole[b][n : n + m], (m, VOCAB)))
            counts = counts + new
            cache.keep(counts)
            assert cache.length == counts.max()


def test_many_tokens_for_rows_of_different_lengths():
    ids, cache = some_ids(0, 2, CONTEXT), EXACT.eval().new_static_cache(2)
    with no_grad():
        EXACT(ids[:, :4], cache=cache)
        for counts in ([4, 2], [2, 4]):
            cache.keep(counts)
            piece = np.stack([row[n : n + 18] for row, n in zip(ids, counts)])
            found = EXACT(piece, cache=cache).data
            for b, n in enumerate(counts):
                close(found[b], EXACT(ids[b : b + 1, : n + 18]).data[0, n:])


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("first, then", [(3, 1), (1, 18), (18, 4), (2, 17)])
def test_heads_that_share_keys_and_windows(n_kv_heads, window, first, then):
    attention = MultiHeadAttention(
        6, 16, CONTEXT, 4, n_kv_heads=n_kv_heads, window=window, generator=Generator(2)
    ).to("float64")
    cache = StaticCache(1, 2, n_kv_heads, CONTEXT, 4, np.float64)
    x, pieces = np.random.default_rng(0).standard_normal((2, first + then, 6)), []
    with no_grad():
        for piece in np.split(x, [first], axis=1):
            cache.positions(piece.shape[1])
            pieces.append(attention(Tensor(piece), cache=cache.layers[0]).data)
            cache.commit()
        close(np.concatenate(pieces, axis=1), attention(Tensor(x)).data)


def test_what_the_cache_refuses():
    with no_grad():
        cache = EXACT.new_static_cache(1)
        EXACT(some_ids(0, 1, 20), cache=cache)
        says = r"ids of shape \(1, 5\) after the 20 in the cache exceed context_length 24"
        with pytest.raises(ValueError, match=says):
            EXACT(some_ids(0, 1, 5), cache=cache)
        cache.truncate(19)
        EXACT(some_ids(0, 1, 5), cache=cache)
        with pytest.raises(ValueError, match=r"StaticCache: keys of shape .* do not fit"):
            EXACT(some_ids(0, 2, 4), cache=EXACT.new_static_cache(1))
        turning = MultiHeadAttention(6, 16, CONTEXT, 4, rope=RotaryEmbedding(4, CONTEXT))
        with pytest.raises(ValueError, match="goes without masks, segments and rope"):
            turning(Tensor(np.zeros((1, 1, 6), np.float32)), cache=cache.layers[0])
    with pytest.raises(RuntimeError, match=r"a StaticCache keeps no gradients: .* no_grad\(\)"):
        EXACT(some_ids(0, 1, 1), cache=EXACT.new_static_cache(1))
    assert FEW_QUERIES == decode.MOST_QUERIES


def on_numpy(model=EXACT):
    """A Decoder that does as on a device."""
    decoder = Decoder(model)
    decoder._kept = DeviceTexts(model)
    return decoder


@given(st.data())
@settings(max_examples=25)
def test_one_decoder_for_many_texts(data):
    """Few different ids: beginnings are shared often, by some rows more than by others."""
    decoder = on_numpy()
    for _ in range(5):
        rows, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, CONTEXT + 3))
        row = st.lists(st.sampled_from([0, 0, 0, 1]), min_size=T, max_size=T)
        ids = np.array(data.draw(st.lists(row, min_size=rows, max_size=rows)))
        pads = st.lists(st.integers(0, T - 1), min_size=rows, max_size=rows)
        padding = np.array(data.draw(pads))
        for n in range(T - min(data.draw(st.integers(0, 2)), T - 1 - padding.max()), T + 1):
            found = decoder(ids[:, :n], padding)
            for b, p in enumerate(padding):
                close(found[b], last_logits(ids[b : b + 1, p:n])[0])
        chosen = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4)))
        decoder.select(chosen)
        close(decoder(ids[chosen, -3:]), last_logits(ids[chosen, -3:]))


def test_only_what_is_new_is_computed(monkeypatch):
    computed = []
    hidden_states = GPT.hidden_states

    def spy(self, ids, *rest, **keywords):
        computed.append(np.shape(ids))
        return hidden_states(self, ids, *rest, **keywords)

    monkeypatch.setattr(GPT, "hidden_states", spy)
    decoder = on_numpy()
    decoder(np.array([[1, 2, 3, 4], [0, 0, 5, 6]]), np.array([0, 2]))
    decoder(np.array([[1, 2, 3, 4, 5], [0, 0, 5, 6, 7]]), np.array([0, 2]))
    decoder(np.array([[1, 2, 3, 4, 9], [0, 5, 6, 7, 8]]), np.array([0, 1]))
    decoder(np.array([[1, 2, 7, 4, 5], [0, 5, 6, 7, 8]]), np.array([0, 1]))
    decoder.select(np.array([1, 0]))
    decoder(np.array([[5, 6, 7, 8, 1], [1, 2, 7, 4, 5]]))
    assert computed == [(2, 4), (2, 1), (2, 1), (2, 3), (2, 1)]


@pytest.mark.parametrize("where", [EXACT.blocks[0].ff, EXACT.blocks[1].att, EXACT.out_head])
def test_what_was_interrupted_mixes_no_texts(where, monkeypatch):
    def forward(*_):
        raise KeyboardInterrupt

    texts = some_ids(0, 2, 1, 9)
    texts[:, :, :2] = 5
    for first in (0, 1):
        decoder = on_numpy()
        decoder(texts[0, :, :6])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(where, "forward", forward)
            decoder(texts[1])
        for text in (texts[first], texts[1 - first]):
            close(decoder(text), last_logits(text))


def test_a_caller_may_change_its_ids():
    ids, decoder = some_ids(0, 1, 6), on_numpy()
    decoder(ids)
    ids[0, 2] = (ids[0, 2] + 1) % VOCAB
    close(decoder(ids), last_logits(ids))


# --- on the device --------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3, 4], [5], [6, 7, 8, 9, 1, 2, 3]]


@interpreted
def test_greedy_texts_beyond_the_context_with_stops(small, recordings):
    options = {"temperature": 0, "stop_id": [12, 10]}
    expected = generate(SMALL, PROMPTS, 8, **options)
    assert len({len(row) - len(p) for row, p in zip(expected, PROMPTS)}) > 1  # some have stopped
    assert max(map(len, expected)) > 12
    found = generate(small, PROMPTS, 8, **options)
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]
    assert len(recordings) == 1


@interpreted
def test_the_host_reads_only_what_was_chosen(small, recordings, monkeypatch):
    read = []
    get = DeviceArray.get
    monkeypatch.setattr(DeviceArray, "get", lambda x, **how: read.append(x.shape) or get(x, **how))
    ids = some_ids(1, 2, 8)
    limit = generate(SMALL, ids, 5, temperature=0)[:, 8:].max()  # the id that is now left out
    options = {"temperature": 0, "vocab_size": limit}
    found = generate(small, ids, 5, **options)
    assert read == [(2,)] * 5  # until the context is full
    np.testing.assert_array_equal(found, generate(SMALL, ids, 5, **options))
    assert len(recordings) == 1


@interpreted
def test_drawn_texts_are_those_of_the_cpu(small, recordings):
    on_device = Decoder(small)
    for options in (
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 0, "repetition_penalty": 2},
    ):
        texts = [
            generate(model, PROMPTS[:2], 4, generator=Generator(3), **options, decoder=decoder)
            for model, decoder in ((SMALL, None), (small, on_device))
        ]
        assert [row.tolist() for row in texts[0]] == [row.tolist() for row in texts[1]]
    assert len(recordings) == 1


@interpreted
def test_beam_search_reorders_in_place(small, recordings):
    expected = beam_search(SMALL, [1, 2], 5, beams=3, n_best=3)
    found = beam_search(small, [1, 2], 5, beams=3, n_best=3)
    assert [beam.ids.tolist() for beam in found] == [beam.ids.tolist() for beam in expected]
    np.testing.assert_allclose(
        [beam.score for beam in found], [beam.score for beam in expected], rtol=1e-5
    )
    assert len(recordings) == 1


@interpreted
def test_a_conversation_and_two_that_take_turns(small, recordings):
    """One Decoder: a text that goes on, one that shares a beginning, and two at the same time."""
    decoder = Decoder(small)

    def said(text, n=3):
        return list(stream(small, text, n, temperature=0, decoder=decoder))

    def expected(text, n=3):
        return list(stream(SMALL, text, n, temperature=0))

    text = [1, 2, 3]
    text += said(text)
    assert text[3:] == expected(text[:3])
    for other in ([*text, 4, 5], [*text[:2], 9]):
        assert said(other, 2) == expected(other, 2)
    first, second = ([1, 2, 3], [7, 8])
    turns = [stream(small, t, 3, temperature=0, decoder=decoder) for t in (first, second)]
    taken = list(zip(*turns))
    assert [list(t) for t in zip(*taken)] == [expected(first), expected(second)]
    assert len(recordings) == 1


@interpreted
def test_many_new_tokens_after_some(recordings):
    """Also where the rows do not share as much with those before."""
    model, expected = gpt(CONTEXT, 1).to("interpret"), gpt(CONTEXT, 1)
    decoder, ids = Decoder(model), some_ids(0, 2, CONTEXT)
    for n, second in ((3, 0), (22, 1), (23, 1)):
        ids[1, 1] = second
        np.testing.assert_allclose(
            decoder(ids[:, :n]), last_logits(ids[:, :n], expected), rtol=1e-4, atol=1e-4
        )
    assert decoder.why_no_graph is None
    assert not recordings  # with room for two tokens it would not pay


@interpreted
def test_without_a_graph(small, monkeypatch):
    class Refused(graph.Graph):
        def __init__(self, function, warmups=2):
            function()
            raise graph.GraphError("no graph today")

    monkeypatch.setattr(graph, "Graph", Refused)
    decoder = Decoder(small)
    found = list(stream(small, [1, 2], 4, temperature=0, decoder=decoder))
    assert found == list(stream(SMALL, [1, 2], 4, temperature=0))
    assert decoder.why_no_graph == "no graph today"


@interpreted
@pytest.mark.parametrize("choice", ["off", "off:decode,append"])
def test_without_kernels(small, choice):
    with backend.using(backend.reading(choice)):
        decoder = Decoder(small)
        assert decoder.why_no_graph == ("kernels are switched off" if choice == "off" else None)
        found = generate(small, PROMPTS, 4, temperature=0)
    expected = generate(SMALL, PROMPTS, 4, temperature=0)
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]


class Plain(Module):
    """A model without a cache."""

    def __init__(self, model):
        self.model, self.cfg = model, model.cfg

    def forward(self, ids):
        return self.model(ids)


class WithKVCache(Plain):
    """One that has a KVCache only."""

    def __init__(self, model):
        super().__init__(model)
        self.new_cache, self.out_head = model.new_cache, model.out_head
        self.hidden_states = model.hidden_states


@interpreted
@pytest.mark.parametrize("kind", [Plain, WithKVCache])
def test_other_models(small, kind):
    for options in ({"temperature": 0}, {"generator": Generator(3)}):
        expected = generate(SMALL, [1, 2], 2, **{**options, "generator": Generator(3)})
        found = generate(kind(small), [1, 2], 2, **options)
        np.testing.assert_array_equal(found, expected)


@interpreted
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype, recordings):
    model = copy.deepcopy(SMALL).to(dtype)
    there = copy.deepcopy(model).to("interpret")
    decoder, ids = Decoder(there), some_ids(0, 2, 5)
    for n in (3, 4, 5):
        found = decoder(ids[:, :n])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, last_logits(ids[:, :n], SMALL), atol=0.15)
    assert generate(there, ids, 2, temperature=0).shape == (2, 7)


@interpreted
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_what_is_wrong_is_said(small):
    for ids in ([[1, VOCAB]], [[1, 2], [VOCAB, 3]]):
        with pytest.raises(IndexError, match=f"id {VOCAB} is not in 0..12"):
            generate(small, ids, 1, temperature=0)
    decoder = Decoder(small)
    decoder(np.array([[1]]))
    with pytest.raises(IndexError, match=f"id {VOCAB} is not in 0..12"):
        decoder(np.array([[1, VOCAB]]))
    broken = copy.deepcopy(SMALL)
    broken.final_norm.bias.data[0] = np.nan
    broken = broken.to("interpret")
    for temperature in (0, 1.0):
        with pytest.raises(FloatingPointError, match="nan or infinite"):
            generate(broken, [[1]], 2, temperature)
