"""Packing: each pair of input and target once, and the loss of the documents one by one."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import functional as F  # noqa: N812
from tinygrad_llm.data import DataLoader, pack
from tinygrad_llm.nn import segment_mask, segment_positions
from tinygrad_llm.tensor import Tensor


def documents(min_size=0, max_size=30):
    document = st.lists(st.integers(1, 40), min_size=min_size, max_size=max_size)
    return st.lists(document, min_size=1, max_size=12).filter(lambda d: max(map(len, d)) > 1)


def test_by_hand():
    packed = pack([[1, 2, 3, 4], [5, 6, 7], [8, 9]], max_length=4, split=True)
    assert packed.inputs.tolist() == [[1, 2, 3, 5], [6, 8, 0, 0]]
    assert packed.targets.tolist() == [[2, 3, 4, 6], [7, 9, -100, -100]]
    assert packed.segments.tolist() == [[0, 0, 0, 1], [1, 2, -1, -1]]
    assert segment_positions(packed.segments).tolist() == [[0, 1, 2, 0], [0, 0, 0, 1]]
    assert packed.fill == 6 / 8
    whole = pack([[1, 2, 3, 4], [5, 6, 7], [8, 9]], max_length=4)
    assert whole.inputs.tolist() == [[1, 2, 3, 8], [5, 6, 0, 0]]
    assert whole.segments.tolist() == [[0, 0, 0, 2], [1, 1, -1, -1]]
    assert segment_positions(whole.segments).tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]


@given(documents=documents(), max_length=st.integers(1, 12), split=st.booleans())
def test_each_pair_once(documents, max_length, split):
    if not split:
        documents = [document[: max_length + 1] for document in documents]
    packed = pack(documents, max_length, split)
    used = packed.segments >= 0
    assert packed.inputs.shape[1] == max_length
    assert (packed.targets[~used] == -100).all() and (packed.inputs[~used] == 0).all()
    for number, document in enumerate(documents):
        here = packed.segments == number  # row by row, from left to right
        assert packed.inputs[here].tolist() == document[:-1]
        assert packed.targets[here].tolist() == document[1:]
    if split:
        assert used.ravel()[: used.sum()].all()  # only the end is padded
        assert (~used).sum() < max_length
    for segments, positions in zip(packed.segments, segment_positions(packed.segments)):
        for number in set(segments.tolist()) - {-1}:
            places = np.flatnonzero(segments == number)
            assert np.diff(places).tolist() == [1] * (len(places) - 1)
            assert positions[places].tolist() == list(range(len(places)))


def test_whole_documents_take_few_rows():
    sizes = np.random.default_rng(0).integers(2, 64, 500)
    packed = pack([np.arange(size) for size in sizes], 64, split=False)
    assert packed.fill > 0.95
    assert len(packed) <= -(-(sizes - 1).sum() // 64) * 11 / 9 + 1  # of the best, proved


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_whole_documents_go_where_the_least_room_is_left(sizes):
    """By trying all rows; of rows with the same room, the one that took a document last."""
    rows, recent = [], []  # the documents of each row; rows, the last that took one first

    def room(row):
        return 12 - sum(sizes[number] for number in rows[row])

    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        fitting = [row for row in recent if room(row) >= sizes[number]]
        row = min(fitting, key=room, default=len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        recent = [row, *(other for other in recent if other != row)]

    packed = pack([range(size + 1) for size in sizes], 12)
    for found, row in zip(packed.segments.tolist(), rows, strict=True):
        expected = [number for number in row for _ in range(sizes[number])]
        assert found == expected + [-1] * (12 - len(expected))


def test_many_short_documents_in_long_rows():
    sizes = np.random.default_rng(0).integers(2, 200, 40_000)
    documents = [np.zeros(size, np.uint16) for size in sizes]
    before = time.process_time()
    assert pack(documents, 8192).fill > 0.99
    assert time.process_time() - before < 3  # 0.3 on a quiet core; 6 when each looked at all rooms


def test_loader_goes_through_the_rows():
    packed = pack([range(50)], 10, split=True)
    batches = list(DataLoader(packed, 2))
    assert [len(inputs) for inputs, *_ in batches] == [2, 2, 1]
    inputs, targets, segments = batches[1]
    assert inputs.tolist() == packed.inputs[2:4].tolist()
    assert targets.tolist() == packed.targets[2:4].tolist()
    assert segments.tolist() == packed.segments[2:4].tolist()


def test_one_row():
    packed = pack([range(50)], 10, split=True)
    for index in (0, 4, -1, np.int64(2)):
        parts = packed[index]
        assert [part.tolist() for part in parts] == [p[0].tolist() for p in packed.batch([index])]
    assert len(list(packed)) == len(packed)
    with pytest.raises(IndexError):
        packed[5]
    with pytest.raises(TypeError, match="integer"):
        packed[1.0]


def test_mask():
    mask = segment_mask([[0, 0, 1, 1, 0]])  # a run of equal numbers is a segment
    assert mask.shape == (1, 1, 5, 5) and mask.dtype == bool
    assert mask[0, 0].astype(int).tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


class TinyModel:
    """One block of attention with two heads, in float64."""

    def __init__(self, vocab_size=41, positions=32, dim=8):
        rng = np.random.default_rng(0)
        shapes = (vocab_size, dim), (positions, dim), (dim, 3 * dim), (vocab_size, dim)
        self.parameters = [Tensor(rng.normal(size=shape), requires_grad=True) for shape in shapes]

    def loss(self, inputs, targets, positions, mask):
        """The sum over all targets that count."""
        tok, pos, qkv, head = self.parameters
        B, T = inputs.shape
        x = F.embedding(inputs, tok) + F.embedding(positions, pos)  # (B, T, C)
        parts = (x @ qkv).reshape(B, T, 6, -1).permute(0, 2, 1, 3)  # (B, 6, T, D)
        q, k, v = parts[:, :2], parts[:, 2:4], parts[:, 4:]
        y = F.scaled_dot_product_attention(q, k, v, mask)  # (B, heads, T, D)
        x = x + y.permute(0, 2, 1, 3).reshape(B, T, -1)
        return F.cross_entropy(x @ head.T, targets, reduction="sum")

    def gradients(self, batches):
        """The loss over all batches, and its gradients."""
        for parameter in self.parameters:
            parameter.grad = None
        total = 0.0
        for batch in batches:
            loss = self.loss(*batch)
            loss.backward()
            total += loss.item()
        return total, [parameter.grad.numpy() for parameter in self.parameters]


@pytest.mark.parametrize("split", [True, False])
def test_the_loss_is_that_of_the_documents_alone(split):
    rng = np.random.default_rng(1)
    sizes = rng.integers(2, 17, 20)
    texts = [rng.integers(1, 41, size) for size in sizes]
    packed = pack(texts, 16, split)
    positions, mask = segment_positions(packed.segments), segment_mask(packed.segments)
    model = TinyModel()
    together = [(packed.inputs, packed.targets, positions, mask & np.tri(16, dtype=bool))]
    loss, gradients = model.gradients(together)

    pieces = []  # a row's part of a document, alone
    for row in range(len(packed)):
        for number in set(packed.segments[row].tolist()) - {-1}:
            here = packed.segments[row] == number
            inputs, targets = packed.inputs[row][None, here], packed.targets[row][None, here]
            T = inputs.shape[1]
            pieces.append((inputs, targets, np.arange(T)[None], np.tri(T, dtype=bool)))
    if not split:
        assert sorted(p[0].shape[1] + 1 for p in pieces) == sorted(sizes.tolist())
    alone, expected = model.gradients(pieces)
    assert loss == pytest.approx(alone, rel=1e-13)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        pack([[1, 2]], 0)
    with pytest.raises(ValueError, match="pad_id is an id of the vocabulary, at least 0, not -5"):
        pack([[1, 2]], 4, pad_id=-5)
    with pytest.raises(ValueError, match="one sequence of ids"):
        pack([1, 2, 3], 4)
    for nothing in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="nothing to pack"):
            pack(nothing, 4)
    with pytest.raises(ValueError, match="document 1 has 6 tokens, a row of max_length 4 takes 5"):
        pack([[1, 2], range(6)], 4)
    for text in (["ab"], "ab"):
        with pytest.raises(TypeError, match="got a text: give tokenizer"):
            pack(text, 4)
    with pytest.raises(TypeError, match="encode the text first"):
        pack([list("text")], 4)
