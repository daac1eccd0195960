"""Classification: the book's rows and counts, padding that nobody sees, files that transformers
opens, scores as scikit-learn defines them, and errors that name the line."""

import copy
import csv
import json
import os
import time
from pathlib import Path

import gpu_harness
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import change_config, change_weights, make_model, make_theirs

from tinygrad_llm import grad, no_grad, random, tensor
from tinygrad_llm.checkpoint import compare_checkpoints, export_checkpoint, open_checkpoint
from tinygrad_llm.data import DataLoader, EpochBatches
from tinygrad_llm.finetune import (
    LAYERS,
    POSITIONS,
    ClassificationDataset,
    GPTClassifier,
    Scores,
    Table,
    WordClassifier,
    evaluate,
    padding_id,
    plot_confusion,
    read_table,
    split,
    undersample,
)
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.nn import no_init
from tinygrad_llm.optim import AdamW
from tinygrad_llm.random import Generator
from tinygrad_llm.tokenizer import BPETokenizer, WordTokenizer, gpt2

DATA = Path(os.environ.get("TINYGRAD_LLM_DATA", ""))
SPAM = DATA / "sms-spam-collection.tsv"
needs_data = pytest.mark.skipif(not SPAM.is_file(), reason="TINYGRAD_LLM_DATA names no folder")
needs_gpt2 = pytest.mark.skipif(
    not os.path.isdir(os.environ.get("TIKTOKEN_CACHE_DIR", "")),
    reason="TIKTOKEN_CACHE_DIR names no folder",
)

TOKENIZER = BPETokenizer.train("to be or not to be, that is the question", 270)


def make_classifier(position="last", n=3, seed=0, **options):
    """Of the model in test_checkpoint: 13 ids, 8 tokens."""
    names = ["no", "maybe", "yes", "never", "often"][:n]
    model = GPTClassifier(make_model(seed), names, position, generator=Generator(seed), **options)
    return model.eval()


def logits_of(model, rows, width=None, padding=0):
    """One batch of rows (lists of ids) in which all that is padded has this id."""
    width = width or max(map(len, rows))
    ids = np.array([[*row, *[padding] * (width - len(row))] for row in rows])
    with no_grad():
        return model(ids, np.array([len(row) for row in rows])).data


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


# --- the book's numbers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spam():
    if not SPAM.is_file():
        pytest.skip("TINYGRAD_LLM_DATA names no folder")
    return read_table(SPAM)


def test_the_books_rows(spam):
    assert spam.counts() == {"ham": 4825, "spam": 747}
    assert len(read_table(SPAM, quotes=False)) == 5574  # lines
    balanced = undersample(spam, seed=123)
    assert balanced.counts() == {"ham": 747, "spam": 747}
    numbers = [spam.texts.index(text) for text in balanced.texts[:3]]
    assert numbers == [4307, 4138, 4831]
    assert balanced.places[0] == f"{SPAM}, line 4308"
    parts = split(balanced, seed=123)
    assert [len(part) for part in parts] == [1045, 149, 300]
    assert sorted(sum((part.texts for part in parts), ())) == sorted(balanced.texts)


def test_rows_and_their_order_are_those_of_pandas(spam):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(SPAM, sep="\t", header=None, names=["Label", "Text"])
    assert list(frame.Text) == list(spam.texts) and list(frame.Label) == labels_of(spam)
    ham, junk = (frame[frame.Label == name] for name in ("ham", "spam"))
    balanced = pandas.concat([ham.sample(len(junk), random_state=7), junk])
    ours = undersample(spam, seed=7)
    assert list(balanced.Text) == list(ours.texts)
    shuffled = balanced.sample(frac=1, random_state=9)
    parts = split(ours, seed=9)
    assert list(shuffled.Text) == [text for part in parts for text in part.texts]
    assert list(shuffled.Label) == [label for part in parts for label in labels_of(part)]


def labels_of(table):
    return [table.classes[i] for i in table.labels.tolist()]


@needs_gpt2
def test_the_books_batches(spam):
    tokenizer = gpt2()
    train, *others = split(undersample(spam))
    datasets = [ClassificationDataset(train, tokenizer)]
    datasets += [ClassificationDataset(t, tokenizer, datasets[0].max_length) for t in others]
    assert datasets[0].max_length == 120
    assert [dataset.truncated for dataset in datasets[:1]] == [0]
    loaders = [
        DataLoader(dataset, 8, shuffle=i == 0, drop_last=i == 0)
        for i, dataset in enumerate(datasets)
    ]
    assert [len(loader) for loader in loaders] == [130, 19, 38]
    ids, labels, lengths = next(iter(loaders[0]))
    assert ids.shape == (8, 120) and labels.shape == lengths.shape == (8,)
    places = np.arange(120)
    assert (ids[places >= lengths[:, None]] == 50256).all()
    first = others[0].texts[0]
    assert tokenizer.decode(datasets[1].rows[0]) == first


def test_the_books_parameters():
    with no_init():
        gpt = GPT(GPTConfig(qkv_bias=True))  # 124M, of which no number is touched
        model = GPTClassifier(gpt, ["ham", "spam"])
    assert model.num_parameters() == 124_441_346

    def trained(layers):
        model.train_only(layers)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert {layers: trained(layers) for layers in LAYERS} == {
        "head": 1_538,
        "last_block": 7_090_946,
        "last_two": 7_090_946 + 7_087_872,
        "all": 124_441_346,
    }


def test_the_heads_first_weights_are_pytorchs():
    torch = pytest.importorskip("torch")
    torch.manual_seed(123)
    theirs = torch.nn.Linear(12, 3)
    random.manual_seed(123)
    ours = GPTClassifier(make_model(), ["a", "b", "c"]).head
    np.testing.assert_array_equal(ours.weight.data, theirs.weight.detach().numpy())
    np.testing.assert_array_equal(ours.bias.data, theirs.bias.detach().numpy())


@needs_gpt2
def test_words_alone_reach_what_the_book_does(spam):
    train, validation, test = split(undersample(spam))
    words = WordClassifier(train)
    assert 0.94 <= words.evaluate(validation).accuracy <= 0.99
    assert 0.94 <= words.evaluate(test).accuracy <= 0.99
    assert words.evaluate(train).accuracy > 0.99


@pytest.mark.parametrize("most", [4096, 2])
def test_words_are_weighed_by_tf_idf_and_learned_in_parts(most, monkeypatch):
    monkeypatch.setattr("tinygrad_llm.finetune.baseline.MOST_TEXTS", most)
    texts = ["Win, win!", "win now", "good day", "Good bye now", "WIN a day"]
    table = Table.of(texts, ["spam", "spam", "ham", "ham", "spam"])
    model = WordClassifier(table)
    assert [*model.columns] == ["win", "day", "good", "now", "!", ",", "a", "bye"]
    columns, weights = model._weights("win, win unheard of!")  # new words have no weight
    expected = {"win": 2 * (np.log(6 / 4) + 1), ",": np.log(6 / 2) + 1, "!": np.log(6 / 2) + 1}
    length = np.sqrt(sum(x * x for x in expected.values()))
    found = dict(zip([[*model.columns][i] for i in columns], weights.tolist()))
    assert found == pytest.approx({word: x / length for word, x in expected.items()})
    assert model.evaluate(table).confusion.tolist() == [[2, 0], [0, 3]]
    new = Table.of(["win", "good", "bye bye", "quite new"], ["spam", "ham", "ham", "ham"])
    assert model.evaluate(new).confusion.tolist()[1] == [0, 1]
    with pytest.raises(ValueError, match="the words tell ham, spam apart, and the table has a, b"):
        model.evaluate(Table.of(["x", "y"], ["a", "b"]))


def test_a_large_table_is_read_in_seconds(tmp_path):
    lines = [f"{'ham' if i % 3 else 'spam'}\ttext number {i}\n" for i in range(100_000)]
    start = time.perf_counter()
    table = read_table(write(tmp_path / "a.tsv", "".join(lines)))
    parts = split(undersample(table))
    assert sum(map(len, parts)) == 2 * 33334
    assert time.perf_counter() - start < 20  # 0.5 s; what is quadratic takes minutes


# --- rows -----------------------------------------------------------------------------------------

labelled = st.lists(st.sampled_from("abc"), min_size=20, max_size=80).filter(
    lambda labels: len(set(labels)) > 1
)


@given(labelled, st.integers(0, 2**32 - 1), st.floats(0.1, 0.7), st.floats(0.1, 0.2))
def test_balancing_and_splitting_lose_and_repeat_nothing(labels, seed, train, validation):
    table = Table.of([f"text {i}" for i in range(len(labels))], labels)
    balanced = undersample(table, seed)
    least = min(table.counts().values())
    assert balanced.counts() == dict.fromkeys(table.classes, least)
    known = dict(zip(table.texts, labels))
    assert len(set(balanced.texts)) == len(balanced)
    assert [known[text] for text in balanced.texts] == labels_of(balanced)
    parts = split(table, train, validation, seed)
    assert sorted(text for part in parts for text in part.texts) == sorted(table.texts)
    for part in parts:
        assert [known[text] for text in part.texts] == labels_of(part)
    assert [len(part) for part in parts[:2]] == [
        int(train * len(labels)),
        int(validation * len(labels)),
    ]
    again = split(table, train, validation, seed)
    assert [part.places for part in again] == [part.places for part in parts]


fields = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\ufeff"), min_size=1
).filter(str.strip)
pairs = st.lists(st.tuples(fields, fields), min_size=2).filter(
    lambda rows: len({label.strip() for label, _ in rows}) > 1
)


@given(pairs, st.sampled_from([".tsv", ".csv", ".jsonl"]))
@settings(max_examples=60)
def test_what_others_write_is_read(tmp_path_factory, rows, suffix):
    path = tmp_path_factory.mktemp("table") / f"t{suffix}"
    with open(path, "w", encoding="utf-8", newline="") as file:
        if suffix == ".jsonl":
            file.writelines(json.dumps({"Text": t, "Label": la}) + "\n" for la, t in rows)
        else:
            writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",", quoting=1)
            writer.writerows([("Label", "Text"), *rows])
    table = read_table(path, "Text", "Label")
    assert list(zip(labels_of(table), table.texts)) == [(la.strip(), text) for la, text in rows]
    assert list(table.classes) == sorted({label.strip() for label, _ in rows})


def test_columns_headers_and_encodings(tmp_path):
    rows = "ham,hello\nspam,win\nham,ok\nspam,now\n"
    for name, text, options in [
        ("a.csv", rows, {}),
        ("b.csv", "Label,Text\n" + rows, {}),
        ("c.csv", "LABEL,TEXT\n" + rows, {"header": True}),
        ("d.csv", "\ufeffkind,message\n\n" + rows, {"label": "kind", "text": "Message"}),
        ("e.csv", "kind,message\n" + rows, {"label": 0, "text": 1, "header": True}),
        ("f.tsv", rows.replace(",", "\t").replace("\n", "\r\n"), {"label": 0, "text": 1}),
    ]:
        table = read_table(write(tmp_path / name, text), **options)
        assert table.texts == ("hello", "win", "ok", "now") and table.classes == ("ham", "spam")
    tens = write(tmp_path / "k.csv", "10,a\n9,b\n-1,c\n9,d\n10,e\n")
    assert read_table(tens).classes == ("-1", "9", "10")  # and not as texts
    assert Table.of("xyz", ["10", "9", "x"]).classes == ("10", "9", "x")
    swapped = read_table(write(tmp_path / "g.csv", "a,x\nb,y\n"), 0, 1, header=False)
    assert swapped.texts == ("a", "b")
    latin = write(tmp_path / "h.csv", "a,\u00a35\nb,no\n", "latin-1")
    assert read_table(latin, header=False, encoding="latin-1").texts[0] == "\u00a35"
    numbers = write(tmp_path / "i.jsonl", '{"text": "x", "label": 0}\n\n{"text": "y", "label": 1}')
    assert read_table(numbers).classes == ("0", "1")
    known = read_table(numbers, classes=["1", "0", "2"])  # the order of a model's
    assert known.labels.tolist() == [1, 0] and known.counts() == {"1": 1, "0": 1, "2": 0}
    alone = write(tmp_path / "j.csv", "a,x\na,y\n")
    assert read_table(alone, classes=["a", "b"]).counts() == {"a": 2, "b": 0}


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("a.csv", "a,x\nb,y,z\n", {}, r"a\.csv, line 2: the number of fields is 3, and in .* 1 it"),
        ("a.csv", 'a,"x\ny"\nb\n', {}, r"line 3: the number of fields is 1"),
        ("a.csv", 'a,x\nb,"y\nc,z\n', {}, r"line 2: a quote is opened that is never closed"),
        ("a.csv", "a,x\nb,  \n", {}, r"line 2: the text is empty"),
        ("a.csv", "a,x\n ,y\n", {}, r"line 2: the label is empty"),
        ("a.csv", "a,x\na,y\n", {}, r"a\.csv: all labels are 'a': expected two classes"),
        (
            "a.csv",
            "a,x\nc,y\n",
            {"classes": ["a", "b"]},
            r"line 2: unknown label 'c': expected a, b",
        ),
        ("a.csv", "a,x\na,y\n", {"classes": ["a"]}, r"classes are two different names"),
        ("a.csv", "", {}, r"a\.csv has no rows"),
        ("a.csv", "text,label\n", {}, r"a\.csv has no rows"),
        ("a.csv", "kind,words\na,x\nb,y\na,z\n", {}, r"line 1: no other row has the label 'kind'"),
        ("a.csv", "a,x,1\nb,y,2\n", {}, r"line 1: the number of fields is 3: expected a label"),
        ("a.csv", "a,x\nb,y\n", {"text": "words"}, r"line 1: not one column is named 'words'"),
        ("a.csv", "a,a\nb,y\n", {"text": "a"}, r"not one column is named 'a'"),
        ("a.csv", "a,x\nb,y\n", {"text": 2}, r"there is no column 2: expected 0 to 1"),
        ("a.csv", "a,x\nb,y\n", {"text": 0}, r"text and label are both column 0"),
        ("a.csv", "a,x\n", {"text": "x", "header": False}, "only in a header"),
        ("a.csv", "a,x\n\0,y\n", {}, r"line 2: a zero byte"),
        ("a.csv", "a,x\n", {"encoding": "klingon"}, "no encoding 'klingon'"),
        ("a.csv", f"a,{'x' * 200_000}\n", {}, r"line 1: a field has more than 131,072 char"),
        ("a.txt", "a,x\n", {}, r"a\.txt: expected a file \.tsv, \.csv or \.jsonl"),
        ("a.jsonl", '{"text": "x", "label": "a"}\n{', {}, r"line 2 is no valid JSON"),
        ("a.jsonl", "\n[1]\n", {}, r"line 2 is a JSON list: expected an object"),
        ("a.jsonl", '{"text": "x"}\n', {}, r"line 1 has no 'label': it has text"),
        ("a.jsonl", '{"text": 1, "label": "a"}\n', {}, r"line 1: the text is of type int"),
        ("a.jsonl", '{"text": "x", "label": null}\n', {}, r"line 1: the label is of type NoneType"),
        ("a.jsonl", "", {"text": 1}, r"values of \.jsonl have names"),
    ],
)
def test_bad_files_are_named_by_line(tmp_path, name, content, options, message):
    with pytest.raises(ValueError, match=message) as error:
        read_table(write(tmp_path / name, content), **options)
    assert "\n" not in str(error.value)


def test_bad_files_and_tables(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="is a directory"):
        read_table(tmp_path)
    with pytest.raises(ValueError, match=r"line 2: these bytes are not utf-8: give the file's"):
        read_table(write(tmp_path / "a.csv", "a,x\nb,\u00a3\n", "latin-1"))
    with pytest.raises(ValueError, match=r"line 1: these bytes are not utf-8"):
        read_table(write(tmp_path / "b.csv", "a,x\nb,y\n", "utf-16"))
    with pytest.raises(ValueError, match="2 texts have 1 labels"):
        Table.of(["x", "y"], ["a"])
    with pytest.raises(ValueError, match="row 2: the text is empty"):
        Table.of(["x", ""], ["a", "b"])
    table = Table.of(list("wxyz"), list("aabb"), ["a", "b", "c"])
    with pytest.raises(ValueError, match="class 'c' has no texts"):
        undersample(table)
    with pytest.raises(ValueError, match="4 rows make parts of 2, 0, 2"):
        split(table, 0.7, 0.1)
    for shares in ((0.9, 0.1), (0.0, 0.5), (0.5, -0.1), (float("nan"), 0.1)):
        with pytest.raises(ValueError, match="expected shares above 0"):
            split(table, *shares)


# --- batches --------------------------------------------------------------------------------------

TEXTS = ["to be", "or", "not to be, that is the question", "the question", "is that it?"]
FEW = Table.of(TEXTS, ["a", "b", "b", "a", "a"])


def test_rows_are_cut_padded_and_counted():
    whole = [TOKENIZER.encode(text) for text in TEXTS]
    longest = max(map(len, whole))
    dataset = ClassificationDataset(FEW, TOKENIZER)
    assert (dataset.max_length, dataset.truncated) == (longest, 0)
    ids, labels, lengths = dataset.batch([2, 0])
    assert labels.tolist() == [1, 0]
    assert lengths.tolist() == [len(whole[2]), len(whole[0])]
    padding = [TOKENIZER.end_of_text] * (longest - len(whole[0]))
    assert ids.tolist() == [whole[2], whole[0] + padding]
    short = ClassificationDataset(FEW, TOKENIZER, 3, pad_id=7)
    assert short.batch([1, 2])[0].tolist() == [(whole[1] + [7, 7])[:3], whole[2][:3]]
    assert short.truncated == sum(len(row) > 3 for row in whole) > 0
    assert ClassificationDataset(FEW, TOKENIZER, context_length=4).max_length == 4
    assert ClassificationDataset(FEW, TOKENIZER, 3, context_length=4).max_length == 3
    trimmed = ClassificationDataset(FEW, TOKENIZER, trim=True).batch([0, 1])[0]
    assert trimmed.shape == (2, max(len(whole[0]), len(whole[1])))
    no_end = WordTokenizer.train("to be", special_tokens=["<|unk|>"])
    assert padding_id(no_end) == no_end.vocab_size - 1


def test_nothing_in_a_text_is_special():
    text = "the end: <|endoftext|>"
    dataset = ClassificationDataset(Table.of([text, "x"], ["a", "b"]), TOKENIZER)
    assert dataset.rows[0].tolist() == TOKENIZER.encode_ordinary(text)
    assert TOKENIZER.end_of_text not in dataset.rows[0]


def test_batches_go_through_each_epoch_once_and_repeat_from_a_state():
    batches = EpochBatches(ClassificationDataset(FEW, TOKENIZER), 2, Generator(5))
    assert batches.batches_per_epoch == 2
    drawn, states = [], []
    for _ in range(7):
        states.append(json.loads(json.dumps(batches.state_dict())))
        drawn.append(next(batches))
    for epoch in (drawn[0:2], drawn[2:4], drawn[4:6]):
        rows = [tuple(row) for ids, _, _ in epoch for row in ids.tolist()]
        assert len(set(rows)) == 4
    assert len({str(ids) for ids, _, _ in drawn}) > 2  # orders differ
    other = EpochBatches(ClassificationDataset(FEW, TOKENIZER), 2, Generator(0))
    for i, state in enumerate(states):
        other.load_state_dict(state)
        for expected in drawn[i:]:
            for a, b in zip(next(other), expected, strict=True):
                np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="batch"):
        EpochBatches(ClassificationDataset(FEW, TOKENIZER), 6, Generator(0))


# --- the model ------------------------------------------------------------------------------------

rows_of_ids = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=8), min_size=1, max_size=5)


@given(rows_of_ids, st.sampled_from(["last", "first", "mean"]), st.integers(0, 12))
@settings(max_examples=60)
def test_nobody_sees_padding(rows, position, padding):
    """Each text of a batch gets the logits that it gets alone, whatever stands behind it."""
    model = make_classifier(position)
    alone = np.concatenate([logits_of(model, [row]) for row in rows])
    batch = logits_of(model, rows, width=8, padding=padding)
    np.testing.assert_allclose(batch, alone, rtol=1e-4, atol=1e-5)


def test_where_the_head_reads():
    rows = [[3, 1, 4, 1], [5, 9]]
    for position in POSITIONS:
        model = make_classifier(position)
        ids = np.array([[3, 1, 4, 1], [5, 9, 0, 0]])
        with no_grad():
            x = model.body.hidden_states(ids).data
        read = {
            "last": [x[0, 3], x[1, 1]],
            "first": [x[0, 0], x[1, 0]],
            "mean": [x[0].mean(axis=0), x[1, :2].mean(axis=0)],
            "last_padded": [x[0, 3], x[1, 3]],
        }
        expected = np.array(read[position]) @ model.head.weight.data.T + model.head.bias.data
        np.testing.assert_allclose(logits_of(model, rows), expected, rtol=1e-5, atol=1e-5)
        with no_grad():  # rows that are full need no lengths
            np.testing.assert_allclose(
                model(ids).data, model(ids, np.array([4, 4])).data, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("position", POSITIONS)
def test_training_lowers_the_loss_of_what_trains_and_changes_nothing_else(position):
    rows, lengths = np.array([[3, 1, 4, 1], [5, 9, 0, 0], [2, 6, 5, 0]]), np.array([4, 2, 3])
    labels = np.array([0, 1, 2])
    for layers in LAYERS:
        model = make_classifier(position).train_only(layers)
        before = copy.deepcopy(model.state_dict())
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        optimizer = AdamW(model.parameters(), lr=0.01)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = model.loss(rows, labels, lengths)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        changed = {n for n, x in model.state_dict().items() if not np.array_equal(x, before[n])}
        assert changed == trained
        if layers in ("last_block", "last_two"):
            model.body.requires_grad_(False)  # the order of calls does not matter:
            model.train_only(layers)  # it says of every layer whether it trains
            assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert {"head.weight", "head.bias"} < trained


def test_the_gradient_is_that_of_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = make_classifier(bias=False)
    model.save_pretrained(tmp_path)
    theirs = open_theirs(transformers, tmp_path)
    ids, lengths, labels = np.array([[3, 1, 4, 1], [5, 9, 12, 12]]), [4, 2], [2, 0]
    model.loss(ids, np.array(labels), np.array(lengths)).backward()
    loss = theirs(torch.tensor(ids), labels=torch.tensor(labels)).loss
    loss.backward()
    np.testing.assert_allclose(model.head.weight.grad.data, theirs.score.weight.grad, atol=1e-5)
    np.testing.assert_allclose(
        model.body.tok_emb.weight.grad.data, theirs.transformer.wte.weight.grad, atol=1e-5
    )


def test_the_body_shares_the_gpts_weights_and_leaves_it_its_head():
    gpt = make_model()
    model = GPTClassifier(gpt, ["a", "b"])
    assert model.body.blocks is gpt.blocks and gpt.out_head is not None
    assert model.num_parameters() == gpt.num_parameters() + 12 * 2 + 2
    with no_grad():
        assert gpt(np.array([[1, 2]])).shape == (1, 2, 13)
    model.recompute = True
    assert model.body.recompute and model.cfg is gpt.cfg and not gpt.recompute


def test_texts_in_any_order_get_their_own_probabilities():
    cfg = GPTConfig(vocab_size=TOKENIZER.vocab_size, context_length=40, emb_dim=12, n_heads=2)
    gpt = GPT(GPTConfig(**{**cfg.to_dict(), "n_layers": 1}), Generator(1))
    for position in POSITIONS:
        model = GPTClassifier(gpt, ["a", "b"], position, max_length=30, generator=Generator(2))
        texts = [*TEXTS, "to be or not " * 20, "x"]
        p = model.probabilities(texts, TOKENIZER, batch_size=2)
        assert p.shape == (7, 2) and p.dtype == np.float32 and model.training
        np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-6)
        for text, expected in zip(texts, p):
            alone = model.probabilities([text], TOKENIZER)[0]
            np.testing.assert_allclose(alone, expected, rtol=1e-4)
        cut = TOKENIZER.decode(TOKENIZER.encode(texts[5])[:30])
        np.testing.assert_allclose(model.probabilities([cut], TOKENIZER)[0], p[5], rtol=1e-4)
        names = model.predict(texts, TOKENIZER)
        assert names == [model.classes[i] for i in p.argmax(axis=1)]
        assert model.probabilities([], TOKENIZER).shape == (0, 2)
        most = 30 if position == "last_padded" else 35  # of which 30 count
        dataset = ClassificationDataset(FEW, TOKENIZER, most)
        loss, scores = evaluate(model, dataset, batch_size=2)
        q = p[: len(TEXTS)]
        np.testing.assert_allclose(loss, -np.log(q[range(5), FEW.labels]).mean(), rtol=1e-4)
        assert scores.accuracy == (q.argmax(axis=1) == FEW.labels).mean()


def test_on_a_device():
    pytest.importorskip("triton")
    ids, lengths, labels = np.array([[3, 1, 4, 1], [5, 9, 12, 12]]), np.array([4, 2]), [2, 0]
    found = []
    for device in ("cpu", gpu_harness.DEVICE):
        model = make_classifier("mean").to(device)
        loss = model.loss(ids, np.array(labels), lengths)
        if device != "cpu":  # a recorded step has its inputs there
            there = [tensor(x).to(device) for x in (ids, np.array(labels), lengths)]
            assert model.loss(*there).item() == loss.item()
        gradient = grad(loss, [model.body.tok_emb.weight])[0].to("cpu").data
        logits = model._logits([row[:n] for row, n in zip(ids, lengths)], 2)
        found.append((loss.item(), gradient, logits))
    for ours, expected in zip(*found):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


def test_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rows = [[3, 1, 4, 1], [5, 9]]
    for position in ("last", "mean"):
        expected = logits_of(make_classifier(position), rows)
        model = make_classifier(position).to("bfloat16")
        found = logits_of(model, rows)
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(found.astype(np.float32), expected, atol=0.1)


def test_bad_arguments_of_a_classifier():
    gpt = make_model()
    for classes in (["a"], [], ["a", "a"], "ab" * 0, "spam", [1, 2]):
        with pytest.raises(ValueError, match="classes are two different names or more"):
            GPTClassifier(gpt, classes)
    for options, message in [
        ({"position": "middle"}, "position is one of last, first"),
        ({"pad_id": 13}, r"pad_id 13 is not in 0\.\.12"),
        ({"max_length": 9}, "max_length 9 is more than the context_length 8"),
        ({"max_length": 0}, "max_length must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            GPTClassifier(gpt, ["a", "b"], **options)
    model = GPTClassifier(gpt, ["a", "b"])
    with pytest.raises(ValueError, match="layers are one of head, last_block"):
        model.train_only("first")
    ids = np.ones((2, 3), int)
    for lengths in ([3, 4], [0, 3], [3], [1.0, 2.0]):
        with pytest.raises(ValueError, match=r"lengths are 2 integers, each of 1\.\.3"):
            model(ids, np.array(lengths))
    with pytest.raises(IndexError, match="target 2 is out of range"):
        model.loss(ids, np.array([0, 2]))
    blank = WordTokenizer.train("to be", special_tokens=["<|unk|>"])
    with pytest.raises(ValueError, match=r"text 2: '  ' has no tokens"):
        model.probabilities(["to", "  "], blank)
    with pytest.raises(TypeError, match="expected a list of texts, not a text"):
        model.predict("to be", TOKENIZER)
    with pytest.raises(TypeError, match="text 2: text must be str"):
        model.predict(["to be", b"or"], TOKENIZER)
    padded = GPTClassifier(gpt, ["a", "b"], "last_padded", max_length=6)
    for options in ({"max_length": 5}, {"max_length": 6, "trim": True}, {}):
        dataset = ClassificationDataset(FEW, TOKENIZER, **options)
        with pytest.raises(ValueError, match="reads at the end of rows of 6 tokens"):
            evaluate(padded, dataset)
    with pytest.raises(ValueError, match="the model tells a, b apart, and the data has b, c"):
        evaluate(model, ClassificationDataset(Table.of(["x", "y"], ["b", "c"]), TOKENIZER))


# --- files ----------------------------------------------------------------------------------------


def open_theirs(transformers, directory):
    kind = transformers.GPT2ForSequenceClassification
    model, info = kind.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [2, 5])
def test_transformers_opens_what_we_save_and_we_what_it_saves(tmp_path, bias, n):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = make_classifier(n=n, bias=bias, pad_id=0)
    model.save_pretrained(tmp_path / "ours")
    theirs = open_theirs(transformers, tmp_path / "ours")
    rows = [[3, 1, 4, 1, 5], [9, 2], [6]]
    ids = torch.tensor([[*row, *[0] * (5 - len(row))] for row in rows])
    with torch.no_grad():
        expected = theirs(ids).logits.numpy()
    np.testing.assert_allclose(logits_of(model, rows), expected, atol=2e-5)
    assert theirs.config.id2label == dict(enumerate(model.classes))
    assert theirs.config.label2id == {name: i for i, name in enumerate(model.classes)}
    assert theirs.config.num_labels == n
    theirs.save_pretrained(tmp_path / "theirs")
    again = GPTClassifier.from_pretrained(tmp_path / "theirs").eval()
    assert (again.classes, again.position, again.pad_id) == (model.classes, "last", 0)
    np.testing.assert_allclose(logits_of(again, rows), expected, atol=2e-5)


def test_a_classifier_that_transformers_made(tmp_path):
    """With its default labels, which it does not write down, and without our keys."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = make_theirs(transformers).config
    theirs = transformers.GPT2ForSequenceClassification(sizes).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPTClassifier.from_pretrained(tmp_path).eval()
    assert ours.classes == ("LABEL_0", "LABEL_1") and ours.max_length == 8
    with torch.no_grad():
        expected = theirs(torch.tensor([[3, 1, 4, 1]])).logits.numpy()
    np.testing.assert_allclose(logits_of(ours, [[3, 1, 4, 1]]), expected, atol=2e-5)


@pytest.mark.parametrize("position", POSITIONS)
def test_all_of_a_classifier_comes_back(tmp_path, position):
    model = make_classifier(position, pad_id=4, max_length=6)
    model.save_pretrained(tmp_path / "a", max_shard_size="2KB")
    again = GPTClassifier.from_pretrained(tmp_path / "a").eval()
    for name in ("classes", "position", "pad_id", "max_length", "cfg"):
        assert getattr(again, name) == getattr(model, name)
    rows = [[3, 1, 4, 1], [5, 9]]
    expected = logits_of(model, rows)
    np.testing.assert_allclose(logits_of(again, rows), expected, atol=1e-5)
    again.save_pretrained(tmp_path / "b")  # from now on, to the bit
    export_checkpoint(tmp_path / "b", tmp_path / "c")
    third = GPTClassifier.from_pretrained(tmp_path / "c", "float64").eval()
    assert compare_checkpoints(*map(open_checkpoint, (tmp_path / "a", tmp_path / "c"))) == ({}, {})
    np.testing.assert_allclose(logits_of(third, rows), expected, atol=1e-5)


def test_a_model_of_untied_weights_with_its_tokenizer(tmp_path):
    V = TOKENIZER.vocab_size
    gpt = make_model(vocab_size=V, tie_weights=False, qkv_bias=True)
    model = GPTClassifier(gpt, ["a", "b"], pad_id=padding_id(TOKENIZER))
    model.save_pretrained(tmp_path, TOKENIZER, "float16")
    again = GPTClassifier.from_pretrained(tmp_path)
    assert again.cfg == gpt.cfg and again.pad_id == TOKENIZER.end_of_text
    p = model.probabilities(TEXTS, TOKENIZER)
    np.testing.assert_allclose(again.probabilities(TEXTS, TOKENIZER), p, atol=1e-2)


def test_a_bias_that_no_norm_can_take_over(tmp_path):
    model = make_classifier()
    model.head.weight.data[1] = model.head.weight.data[0]
    with pytest.raises(ValueError, match=r"the head's bias cannot be written.*bias=False"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"unexpected score\.weight"),
        ({"problem_type": "regression"}, "problem_type is 'regression': supported is"),
        ({"id2label": {"0": "a"}}, "id2label is .*: expected two classes or more"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label is .*: expected two classes or more"),
        ({"id2label": {"0": "a", "1": "a"}}, "id2label is .*: expected two classes or more"),
        ({"id2label": ["a", "b"]}, "id2label is .*: expected two classes or more"),
        ({"id2label": {"0": "a", "1": []}}, "id2label is .*: expected two classes or more"),
        ({"id2label": {"0": "a", "1": "b"}}, r"score\.weight has shape \(3, 12\), expected \(2, "),
        ({"pad_token_id": 99}, r"config\.json: pad_id 99 is not in 0\.\.12"),
        ({"pad_token_id": "x"}, r"config\.json: pad_id 'x' is not in"),
        ({"tinygrad_llm": {"position": "end"}}, r"config\.json: position is one of"),
        ({"tinygrad_llm": {"max_length": 1.5}}, r"config\.json: max_length must be an integer"),
    ],
)
def test_files_that_make_no_classifier(tmp_path, changes, message):
    make_classifier().save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        GPTClassifier.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_classifier_and_a_language_model_are_not_confused(tmp_path):
    make_classifier().save_pretrained(tmp_path / "classifier")
    make_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a classifier, and no language model"):
        GPT.from_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="holds a language model, and no classifier"):
        GPTClassifier.from_pretrained(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        GPTClassifier.from_pretrained(tmp_path / "none")
    change_weights(tmp_path / "classifier", lambda tensors: tensors.pop("score.weight"))
    with pytest.raises(ValueError, match=r"missing score\.weight"):
        GPTClassifier.from_pretrained(tmp_path / "classifier")


# --- scores ---------------------------------------------------------------------------------------

predictions = st.integers(2, 5).flatmap(
    lambda n: st.tuples(
        st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), min_size=1)
    )
)


@given(predictions)
def test_scores_are_what_their_definitions_say(drawn):
    n, pairs = drawn
    labels, predicted = np.array(pairs).T
    scores = Scores.of(labels, predicted, [f"class {i}" for i in range(n)])
    assert scores.accuracy == pytest.approx(np.mean(labels == predicted))
    for i in range(n):
        found = int(np.sum((labels == i) & (predicted == i)))
        said, there = int(np.sum(predicted == i)), int(np.sum(labels == i))
        precision = found / said if said else 0
        recall = found / there if there else 0
        f1 = 2 * precision * recall / (precision + recall) if found else 0
        name, *row, support = scores.report()[i]
        assert (name, support) == (f"class {i}", there)
        assert row == pytest.approx([precision, recall, f1])
        for j in range(n):
            assert scores.confusion[i, j] == np.sum((labels == i) & (predicted == j))
    name, *means, support = scores.report()[-1]
    assert (name, support) == ("macro average", len(pairs))
    assert means == pytest.approx(np.mean([row[1:4] for row in scores.report()[:-1]], axis=0))


@given(predictions)
@settings(max_examples=30)
def test_scores_are_those_of_scikit_learn(drawn):
    metrics = pytest.importorskip("sklearn.metrics")
    n, pairs = drawn
    labels, predicted = np.array(pairs).T
    scores, every = Scores.of(labels, predicted, "abcde"[:n]), range(n)
    np.testing.assert_array_equal(
        scores.confusion, metrics.confusion_matrix(labels, predicted, labels=every)
    )
    options = {"labels": every, "zero_division": 0}
    theirs = metrics.precision_recall_fscore_support(labels, predicted, **options)
    for ours, their in zip((scores.precision, scores.recall, scores.f1, scores.support), theirs):
        np.testing.assert_allclose(ours, their)
    macro = metrics.precision_recall_fscore_support(labels, predicted, average="macro", **options)
    np.testing.assert_allclose(scores.report()[-1][1:4], macro[:3])


def test_a_confusion_matrix_as_a_picture(tmp_path):
    from matplotlib.image import imread

    lots = Scores.of(range(300), range(300), [str(i) for i in range(300)])
    few = Scores.of([0, 0, 1, 1], [0, 1, 1, 1], ["$ham", "a name that is far too long for an axis"])
    many = Scores.of(np.arange(60) % 12, np.arange(60) % 11, [str(i) for i in range(12)])
    for name, scores in (("few", few), ("many", many), ("lots", lots)):
        start = time.perf_counter()
        plot_confusion(tmp_path / f"{name}.png", scores)
        assert time.perf_counter() - start < 20  # 1 s; a text in each of 300² cells takes minutes
        picture = imread(tmp_path / f"{name}.png")
        assert picture.ndim == 3 and picture[..., :3].min() < 0.1 < 0.9 < picture[..., :3].max()
    nothing = Scores.of([], [], ["a", "b"])
    assert nothing.accuracy == 0 and nothing.report()[-1] == ("macro average", 0, 0, 0, 0)
    for labels, predicted in (([0], [2]), ([0, 1], [0]), ([-1], [0]), ([0.0], [0.0])):
        with pytest.raises(ValueError, match=r"integers of 0\.\.1"):
            Scores.of(labels, predicted, ["a", "b"])
