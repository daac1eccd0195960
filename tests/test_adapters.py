"""Adapters in files: PEFT opens ours and we open PEFT's, with the same logits; and whatever does
not fit is one clear line that changes nothing."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from test_checkpoint import make_model
from test_finetune_classification import make_classifier
from test_lora import TARGETS, arrays, disturb, logits, normal

from tinygrad_llm import nn, no_grad
from tinygrad_llm.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter, save_adapter
from tinygrad_llm.finetune import GPTClassifier
from tinygrad_llm.nn import LoRAConfig
from tinygrad_llm.optim import AdamW, decay_groups
from tinygrad_llm.random import Generator
from tinygrad_llm.tensor import Tensor

IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
CONFIGS = {
    "blocks": LoRAConfig(2, 4),
    "all": LoRAConfig(4, 2, dropout=0.1, targets=".*", rslora=True),
    "split": LoRAConfig(3, 8, split_qkv=True),
    "split alone": LoRAConfig(
        np.int64(2), np.float32(5), targets=["1.att.qkv"], split_qkv=True, rslora=True
    ),
}


def adapted(config, seed=0, **changes):
    model = make_model(seed, **changes)
    nn.apply_lora(model, config, generator=Generator(seed + 1))
    return disturb(model.eval())


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="pip install peft, to compare with it")


@pytest.fixture
def theirs_of(tmp_path):
    """transformers' model with the same weights as one of ours."""
    transformers = pytest.importorskip("transformers")

    def make(model):
        model.save_pretrained(tmp_path / "base")
        classifies = isinstance(model, GPTClassifier)
        name = "GPT2ForSequenceClassification" if classifies else "GPT2LMHeadModel"
        return getattr(transformers, name).from_pretrained(tmp_path / "base").eval()

    return make


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


# --- ours and PEFT's ------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_peft_opens_ours(tmp_path, theirs_of, peft, name, tie_weights):
    config = CONFIGS[name]
    if name == "all" and tie_weights:  # PEFT would merge the head's update into the table, too
        config = LoRAConfig(4, 2, targets=r"blocks\..*", rslora=True)
    model = adapted(config, tie_weights=tie_weights)
    save_adapter(model, tmp_path / "adapter")
    theirs = theirs_of(make_model(tie_weights=tie_weights))
    assert np.abs(torch_logits(theirs) - logits(model)).max() > 0.01
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    np.testing.assert_allclose(torch_logits(theirs), logits(model), atol=1e-5)
    merged = theirs.merge_and_unload()
    nn.merge_lora(model)
    np.testing.assert_allclose(torch_logits(merged), logits(model), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn"]},
        {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True},
        {"r": 2, "target_modules": ["c_proj", "lm_head"], "init_lora_weights": "gaussian"},
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["c_attn", "c_fc"],
            "rank_pattern": {"c_fc": 4, r"1\.attn\.c_attn": 1},
            "alpha_pattern": {"c_fc": 9},
            "exclude_modules": ["transformer.h.0.mlp.c_fc"],
        },
    ],
    ids=["c_attn", "all-linear", "head", "patterns"],
)
@pytest.mark.filterwarnings("ignore")
def test_we_open_pefts(tmp_path, theirs_of, peft, settings):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    base = make_model(tie_weights=False)
    theirs = peft.get_peft_model(
        theirs_of(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    before = logits(base)
    counts = load_adapter(base, tmp_path / "adapter", "theirs")
    np.testing.assert_allclose(logits(base), torch_logits(theirs), atol=1e-5)
    assert counts[0] == theirs.get_nb_trainable_parameters()[0]
    nn.set_adapter(base, None)
    np.testing.assert_allclose(logits(base), before, atol=1e-6)
    nn.set_adapter(base, "theirs")
    save_adapter(base, tmp_path / "again", "theirs")
    again = safetensors.numpy.load_file(tmp_path / "again" / ADAPTER_WEIGHTS)
    first = safetensors.numpy.load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    assert again.keys() == {name for name in first if "lora" in name}
    assert all(np.array_equal(a, first[name]) for name, a in again.items())


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_with_a_head_of_its_own(tmp_path, theirs_of, peft):
    """PEFT stores the head's own weight, too, where the head is a target: it must be ours."""
    settings = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["lm_head"]}
    theirs = theirs_of(make_model(tie_weights=False))
    peft.get_peft_model(theirs, peft.LoraConfig(**settings)).save_pretrained(tmp_path / "adapter")
    other = make_model(seed=1, tie_weights=False)
    message = refused(tmp_path / "adapter", model=other)
    assert "lm_head.base_layer.weight is not what this model has there" in message
    load_adapter(make_model(tie_weights=False), tmp_path / "adapter")


def test_names_of_a_model_without_a_head(tmp_path):
    """GPT2Model, which is GPT2LMHeadModel's `transformer`, names its layers h.0.attn and so on."""
    model = adapted(LoRAConfig(2, 4))
    save_adapter(model, tmp_path)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("model.transformer.", "model.")] = tensors.pop(name)

    change(tmp_path, rename)
    again = make_model()
    load_adapter(again, tmp_path)
    np.testing.assert_array_equal(logits(again), logits(model))


# --- classifiers ----------------------------------------------------------------------------------


def classifier(config=None, head=1, **options):
    """The same weights each time; with a config, adapters and another head, as after training."""
    model = make_classifier(**{"bias": False, "pad_id": 0, **options})
    if config is not None:
        nn.apply_lora(model, config, generator=Generator(1))
        disturb(model.eval()).head.requires_grad_()
        model.head.weight.data[...] = normal(*model.head.weight.shape, seed=head)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_peft_opens_a_classifiers(tmp_path, theirs_of, peft, name):
    """Its head, too; where that is a target ("all"), with the update in it."""
    model = classifier(CONFIGS[name])
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    theirs = peft.PeftModel.from_pretrained(theirs_of(classifier()), tmp_path / "adapter").eval()
    assert type(theirs) is peft.PeftModelForSequenceClassification
    np.testing.assert_allclose(torch_logits(theirs), logits(model), atol=1e-5)
    again = classifier()
    counts = load_adapter(again, tmp_path / "adapter")
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-6)
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained == {n for n in again.state_dict() if "lora" in n} | {"head.weight"}
    assert counts == nn.trainable(again)


@pytest.mark.parametrize(
    "settings",
    [
        {"task_type": "SEQ_CLS", "target_modules": ["c_attn"]},
        {"task_type": "SEQ_CLS", "target_modules": ["c_fc", "score"], "use_rslora": True},
        {"target_modules": ["c_proj"], "modules_to_save": ["score"]},
        {"target_modules": ["c_proj", "score"]},  # an adapter of the head
    ],
    ids=["usual", "head as target", "no task", "adapted head"],
)
@pytest.mark.filterwarnings("ignore")
def test_we_open_pefts_classifiers(tmp_path, theirs_of, peft, settings):
    torch = pytest.importorskip("torch")
    theirs = peft.get_peft_model(theirs_of(classifier()), peft.LoraConfig(r=2, **settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    model = classifier()
    counts = load_adapter(model, tmp_path / "adapter", "theirs")
    np.testing.assert_allclose(logits(model), torch_logits(theirs), atol=1e-5)
    assert counts[0] == theirs.get_nb_trainable_parameters()[0]
    save_adapter(model, tmp_path / "again", "theirs")
    again = classifier()
    load_adapter(again, tmp_path / "again")
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-6)


def test_a_classifiers_head_is_that_of_the_adapter(tmp_path):
    """Whichever other one is active or merged."""
    model = classifier(CONFIGS["all"], position="mean")
    nn.apply_lora(model, LoRAConfig(1, 1, targets=".*"), "other")
    disturb(model)
    for layer in nn.lora_layers(model).values():
        layer.adapters.other.lora_B.data[...] += 1
    nn.set_adapter(model, "default")
    expected = logits(model)
    nn.set_adapter(model, "other")
    nn.merge_lora(model)
    assert np.abs(logits(model) - expected).max() > 0.1
    save_adapter(model, tmp_path)
    again = classifier(position="mean")
    load_adapter(again, tmp_path)
    np.testing.assert_allclose(logits(again), expected, atol=1e-5)


def test_a_language_models_adapter_in_a_classifier(tmp_path):
    """The head is left alone, and frozen as the rest."""
    save_adapter(adapted(CONFIGS["blocks"]), tmp_path)
    model = classifier()
    head = model.head.weight.data.copy()
    load_adapter(model, tmp_path)
    np.testing.assert_array_equal(model.head.weight.data, head)
    assert not model.head.weight.requires_grad


def test_classifiers_that_cannot_be_saved(tmp_path):
    for model, words in [
        (classifier(LoRAConfig(2, 4), bias=True), "head has a bias, .* with bias=False$"),
        (classifier(LoRAConfig(2, 4, targets="head")), "'default' is the head's alone"),
    ]:
        with pytest.raises(ValueError, match=words):
            save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_trains_beside_an_adapter_is_not_lost(tmp_path):
    """An adapter's files cannot hold it, and saving them must not look as if they did."""
    model = adapted(LoRAConfig(2, 4))
    nn.apply_lora(model, LoRAConfig(1, 1), "other")
    save_adapter(model, tmp_path / "default")  # beside an adapter that trains
    model.final_norm.requires_grad_()
    with pytest.raises(ValueError, match=r"trains final_norm\.weight, final_norm\.bias, which"):
        save_adapter(model, tmp_path / "a", "other")
    assert not (tmp_path / "a").exists()


def test_classifiers_that_do_not_fit(tmp_path):
    save_adapter(classifier(LoRAConfig(2, 4)), tmp_path)
    for model, words in [
        (make_model(), "modules_to_save ['score'] (whole layers beside the adapters)"),
        (classifier(bias=True), "head has a bias"),
        (classifier(n=2), "score.weight is 'F32' of shape (3, 12), and this classifier's head"),
        (classifier(position="mean"), "classifier with position 'last', not 'mean'"),
    ]:
        assert words in refused(tmp_path, model=model)
    other = classifier()
    other.classes = other.classes[::-1]
    assert "with classes ['no', 'maybe', 'yes'], not ['yes'" in refused(tmp_path, model=other)
    save_adapter(adapted(LoRAConfig(1, 1, targets=["up"])), tmp_path / "up")
    adapted_one = classifier()
    load_adapter(adapted_one, tmp_path / "up", "up")
    with pytest.raises(ValueError, match=r"its adapter 'up' needs: remove_lora first"):
        load_adapter(adapted_one, tmp_path)
    change(tmp_path, lambda t: t.pop("base_model.model.score.weight"))
    assert "the classifier's head: the file is incomplete" in refused(tmp_path, model=classifier())


# --- our own round trip ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_comes_back(tmp_path, name):
    """Every number and setting: training goes on as if nothing had been."""
    model = adapted(CONFIGS[name])
    save_adapter(model, tmp_path / "new" / "adapter")
    again = make_model()
    assert load_adapter(again, tmp_path / "new" / "adapter") == nn.trainable(model)
    saved, loaded = arrays(model), arrays(again)
    assert saved.keys() == loaded.keys()
    assert all(np.array_equal(a, loaded[n]) for n, a in saved.items())
    losses = []
    for each in (model, again):
        optimizer = AdamW(decay_groups(each, 0.1), lr=0.1)
        for layer in nn.lora_layers(each).values():
            (adapter,) = layer.adapters.children()
            assert adapter.dropout.p == CONFIGS[name].dropout and adapter.rank == CONFIGS[name].rank
        for _ in range(3):
            loss = each.loss(IDS, TARGETS)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes_of_the_file_and_of_the_model(tmp_path, dtype):
    model = adapted(CONFIGS["split"])
    save_adapter(model, tmp_path, dtype=dtype)
    again = make_model().to(dtype)
    load_adapter(again, tmp_path)
    assert {p.dtype.name for p in again.parameters()} == {dtype}
    for (name, layer), twin in zip(
        nn.lora_layers(model).items(), nn.lora_layers(again).values(), strict=True
    ):
        a, b = (each.adapters.default for each in (layer, twin))
        for x, y in ((a.lora_A, b.lora_A), (a.lora_B, b.lora_B)):
            assert np.array_equal(x.data.astype(y.dtype), y.data), name


def test_only_the_adapter_that_is_asked_for(tmp_path):
    model = adapted(LoRAConfig(2, 4))
    nn.apply_lora(model, LoRAConfig(1, 1, targets=["up"]), "other")
    save_adapter(model, tmp_path / "a", "default")
    save_adapter(model, tmp_path / "b", "other")
    assert len(safetensors.numpy.load_file(tmp_path / "a" / ADAPTER_WEIGHTS)) == 16
    assert len(safetensors.numpy.load_file(tmp_path / "b" / ADAPTER_WEIGHTS)) == 4
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    again = make_model()
    load_adapter(again, tmp_path / "b", "b")
    load_adapter(again, tmp_path / "a", "a")
    nn.set_adapter(model, "default")
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-6)


def test_models_that_are_no_gpt_keep_their_names(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(3, 4, generator=Generator(0)), nn.ReLU())

    model = make()
    nn.apply_lora(model, LoRAConfig(2, 2, targets=["0"]))
    save_adapter(disturb(model), tmp_path)
    names = safetensors.numpy.load_file(tmp_path / ADAPTER_WEIGHTS)
    assert set(names) == {f"base_model.model.0.lora_{ab}.weight" for ab in "AB"}
    again, x = make(), Tensor(np.eye(3, dtype=np.float32))
    load_adapter(again, tmp_path)
    with no_grad():
        np.testing.assert_array_equal(again(x).data, model(x).data)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    model = adapted(LoRAConfig(2, 4))
    save_adapter(model, tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    other = adapted(LoRAConfig(3, 4), seed=1)
    next(iter(nn.lora_layers(other).values())).adapters.default.lora_B.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"lora_B.weight has numbers up to 1e\+06, too large"):
        save_adapter(other, tmp_path / "a", dtype="float16")
    with pytest.raises(ValueError, match="too large"):
        save_adapter(other, tmp_path / "b", dtype="float16")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert not (tmp_path / "b").exists()


# --- errors ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    save_adapter(adapted(CONFIGS["split"]), tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(directory, error=ValueError, model=None, **keywords):
    """What it says; the model is as before."""
    model = model or make_model()
    before, text = arrays(model), repr(model)
    with pytest.raises(error) as caught:
        load_adapter(model, directory, **keywords)
    assert repr(model) == text and all(p.requires_grad for p in model.parameters())
    assert all(np.array_equal(a, before[name]) for name, a in arrays(model).items())
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"use_dora": True}, "use_dora True (DoRA), which is not supported"),
        ({"bias": "all"}, "bias 'all': supported is 'none'"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head'] (whole layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "which has changed the model's own"),
        ({"peft_type": "IA3"}, "peft_type 'IA3': expected 'LORA'"),
        ({"r": 5}, "rank 9 and a B of rank 9; adapter_config.json says 5"),
        ({"r": None, "rank_pattern": None}, "adapter_config.json says None"),
        ({"lora_alpha": "x", "alpha_pattern": {}}, "lora_alpha 'x': expected a number"),
        ({"lora_alpha": 10**400, "alpha_pattern": {}}, "expected a number"),
        ({"lora_dropout": 2}, "lora_dropout 2: expected a number"),
        ({"rank_pattern": [1]}, "rank_pattern [1]: expected an object"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern has '(', no pattern"),
    ],
)
def test_settings_that_cannot_be(saved, changes, words):
    path = saved / ADAPTER_CONFIG
    config = json.loads(path.read_text())
    if "r" in changes:
        config["rank_pattern"] = {}
        config["r"] = 9
    path.write_text(json.dumps({**config, **changes}))
    message = refused(saved)
    assert words in message and str(saved) in message


def change(directory, edit, metadata=None):
    path = directory / ADAPTER_WEIGHTS
    with safetensors.safe_open(path, "np") as file:
        tensors, header = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118
    edit(tensors)
    safetensors.numpy.save_file(tensors, path, {**header, **(metadata or {})})


PREFIX = "base_model.model.transformer.h."
C_ATTN_B = f"{PREFIX}0.attn.c_attn.lora_B.weight"


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda t: t.pop(C_ATTN_B), "transformer.h.0.attn.c_attn has A or B alone"),
        (lambda t: t.update(x=np.zeros(2)), "unexpected x: expected A and B of LoRA alone"),
        (
            lambda t: t.update({f"{PREFIX}7.attn.c_attn.lora_A.weight": np.zeros((1, 1))}),
            "for another model: transformer.h.7.attn.c_attn is no layer of this one",
        ),
        (lambda t: t.update({C_ATTN_B: t[C_ATTN_B][0]}), "expected a matrix of floats"),
        (lambda t: t.update({C_ATTN_B: t[C_ATTN_B].astype(int)}), "expected a matrix of floats"),
        (lambda t: t.update({C_ATTN_B: t[C_ATTN_B][:, :3].copy()}), "a B of rank 3"),
        (lambda t: t[C_ATTN_B].__setitem__((0, 5), 1), "numbers outside of its parts [12, 12, 12]"),
        (lambda t: t.clear(), "there are no LoRA weights in it"),
    ],
)
def test_weights_that_cannot_be(saved, edit, words):
    change(saved, edit)
    message = refused(saved)
    assert words in message and str(saved) in message


@pytest.mark.parametrize("header", ["{", "[]", '{"parts": {"a": "x"}}', '{"parts": [1]}'])
def test_a_damaged_header_of_parts(saved, header):
    change(saved, lambda t: None, {"tinygrad_llm": header})
    assert "the header of adapter_model.safetensors is damaged" in refused(saved)


def test_parts_that_do_not_fit(saved):
    parts = json.dumps({"parts": {"transformer.h.0.attn.c_attn": [12, 12]}})
    change(saved, lambda t: None, {"tinygrad_llm": parts})
    assert "has parts [12, 12], which do not fit its shape" in refused(saved)


def test_an_adapter_of_another_size(saved):
    message = refused(saved, model=make_model(emb_dim=24))
    assert "for another model" in message and "12 inputs and 36 outputs" in message
    assert "here 24 and 72" in message


def test_directories_and_files_that_are_none(saved, tmp_path):
    assert "does not exist" in refused(tmp_path / "no", FileNotFoundError)
    assert "is a file" in refused(saved / ADAPTER_CONFIG)
    with pytest.raises(TypeError, match="expected a directory"):
        load_adapter(make_model(), 3)
    (tmp_path / "empty").mkdir()
    assert f"has no {ADAPTER_CONFIG}" in refused(tmp_path / "empty", FileNotFoundError)
    shutil.copytree(saved, tmp_path / "half")
    (tmp_path / "half" / ADAPTER_WEIGHTS).rename(tmp_path / "half" / "adapter_model.bin")
    assert "is a pickle" in refused(tmp_path / "half")
    (tmp_path / "half" / "adapter_model.bin").unlink()
    assert "incomplete" in refused(tmp_path / "half", FileNotFoundError)
    for text, words in [("{", "no valid JSON"), ("[]", "holds a JSON list")]:
        shutil.copytree(saved, tmp_path / words)
        (tmp_path / words / ADAPTER_CONFIG).write_text(text)
        assert words in refused(tmp_path / words)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_weights_that_are_cut_short(saved, cut):
    path = saved / ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes()[:cut])
    assert "is no whole safetensors file" in refused(saved)


def test_names_that_are_none(saved, tmp_path):
    model = adapted(LoRAConfig(2, 4))
    with pytest.raises(ValueError, match="no adapter 'x' to save; there is 'default'"):
        save_adapter(model, tmp_path / "x", "x")
    with pytest.raises(ValueError, match="no adapter 'default' to save; there is none"):
        save_adapter(make_model(), tmp_path / "x")
    with pytest.raises(ValueError, match="cannot be written as int8"):
        save_adapter(model, tmp_path / "x", dtype="int8")
    with pytest.raises(ValueError, match="an adapter 'default' already"):
        load_adapter(model, saved)
    assert "is no name" in refused(saved, name="a.b")
    assert not (tmp_path / "x").exists()
