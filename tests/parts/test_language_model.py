import json
import math

import pytest
import torch
from tiny_language import SENTENCES, WORDS, byte_tokenizer, gpt2, llama, word_tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, GPT2TokenizerFast, LlamaTokenizerFast, ViTConfig, ViTModel

from remanence.errors import DataError, SettingError
from remanence.parts.language_model import (
    evaluating,
    held_out_loss,
    is_quantised,
    load_language_model,
    load_tokenizer,
    logits_of,
    token_loss,
)
from remanence.parts.windows import windows
from remanence.task import Data


def toy_data(n=7, length=5, seed=0):
    ids = torch.randint(3, len(WORDS), (n, length + 1), generator=torch.Generator().manual_seed(seed))
    return Data(ids[:, :-1], ids[:, 1:].clone(), torch.arange(n))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_saved_model_comes_back_in_evaluation_mode(make, tmp_path, capfd):
    model = make().train()
    model.save_pretrained(tmp_path)
    capfd.readouterr()
    loaded = load_language_model(str(tmp_path))
    assert not any(module.training for module in loaded.modules())
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert capfd.readouterr() == ("", "")


def test_the_dtype_is_the_folders_own_or_the_one_asked_for(tmp_path):
    gpt2().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_language_model(tmp_path).dtype == torch.bfloat16
    assert load_language_model(tmp_path, torch.float32).dtype == torch.float32


def test_sharded_weights_are_read(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_language_model(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*absent"):
        load_language_model(tmp_path / "absent")
    with pytest.raises(DataError, match=r"has no config.json \(found: nothing\)"):
        load_language_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DataError, match="is not a JSON object"):
        load_language_model(tmp_path)


def test_broken_weights_are_refused(tmp_path):
    gpt2().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match=r"cannot be read .* Save it anew"):
        load_language_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"cannot be read \(OSError"):
        load_language_model(tmp_path)


def test_another_kind_of_model_is_refused(tmp_path):
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(image_size=4, patch_size=2, **size)).save_pretrained(tmp_path / "vit")
    with pytest.raises(SettingError, match="holds a 'vit' model, which is no causal language model"):
        load_language_model(tmp_path / "vit")
    BertModel(BertConfig(vocab_size=9, is_decoder=True, **size)).save_pretrained(tmp_path / "bert")
    with pytest.raises(SettingError, match=r"lacks .* tensors of a causal 'bert' model"):
        load_language_model(tmp_path / "bert")


def test_a_quantised_folder_without_its_kernels_names_the_package(tmp_path):
    gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "nbits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match="needs a package that is not installed"):
        load_language_model(tmp_path)


def test_quantised_weights_are_flagged():
    model = gpt2()
    assert not is_quantised(model)
    model.config.quantization_config = {"quant_method": "hqq"}
    assert is_quantised(model)
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert is_quantised(module)


def test_a_word_level_tokenizer_survives_beside_any_model(tmp_path):
    for make in (gpt2, llama):  # AutoTokenizer must not rebuild it as the family's BPE
        make().save_pretrained(tmp_path)
        word_tokenizer().save_pretrained(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert loaded.convert_ids_to_tokens(loaded("the cat sat, zzz")["input_ids"]) == ["the", "cat", "sat", ",", "<unk>"]
        assert loaded.eos_token_id == 1


@pytest.mark.parametrize("eos", [1, [1, 2]])
def test_a_lone_tokenizer_json_takes_its_eos_from_the_config(eos, tmp_path):
    word_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eos_token_id is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": eos}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_token, loaded("cat")["input_ids"]) == ("<eos>", [WORDS.index("cat")])


@pytest.mark.parametrize("family", [GPT2TokenizerFast, LlamaTokenizerFast])
def test_byte_level_tokenizers_round_trip(family, tmp_path):
    tokenizer = family(tokenizer_object=byte_tokenizer(), eos_token="<|endoftext|>", bos_token="<|endoftext|>", unk_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in SENTENCES:
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) > 1
    assert loaded.eos_token == "<|endoftext|>"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*absent"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(DataError, match=r"no tokenizer can be read from .*found: nothing"):
        load_tokenizer(tmp_path)
    gpt2().save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"has no file of a tokenizer \(found: config.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer.json cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_loss_is_transformers_own_shifted_loss(make):
    model, data = make(), toy_data()
    whole = torch.cat([data.inputs, data.targets[:, -1:]], 1)
    expected = model(whole, labels=whole).loss
    assert torch.allclose(token_loss(model, data.inputs, data.targets), expected, rtol=1e-6)
    assert held_out_loss(model, data, batch_size=3) == pytest.approx(expected.item(), rel=1e-6)


def test_padding_and_other_negative_targets_count_nothing():
    model, data = gpt2(), toy_data(2)
    targets = data.targets.clone()
    targets[0, 3:], targets[1, :2] = -100, -1
    each = F.cross_entropy(model(data.inputs).logits.flatten(0, 1), data.targets.flatten(), reduction="none").view(2, -1)
    expected = torch.cat([each[0, :3], each[1, 2:]]).mean()
    assert torch.allclose(token_loss(model, data.inputs, targets), expected)
    # tokens are weighed alike, however they fall into batches, and a batch without any target is no obstacle
    table = Data(torch.cat([data.inputs] * 2), torch.cat([targets, torch.full_like(targets, -100)]), torch.arange(4))
    for size in (1, 2, 3, 9):
        assert held_out_loss(model, table, size) == pytest.approx(expected.item(), rel=1e-6)


def test_the_softmax_runs_in_float32():
    data = toy_data()
    model = gpt2().to(torch.bfloat16)
    loss = token_loss(model, data.inputs, data.targets)
    expected = F.cross_entropy(model(data.inputs).logits.float().flatten(0, 1), data.targets.flatten())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected) or torch.allclose(loss, expected, rtol=1e-6)


def test_the_loss_has_a_gradient_and_any_module_will_do():
    data, table = toy_data(), nn.Embedding(len(WORDS), len(WORDS))
    nn.init.zeros_(table.weight)
    loss = token_loss(table, data.inputs, data.targets)
    assert loss.item() == pytest.approx(math.log(len(WORDS)), rel=1e-6)
    loss.backward()
    assert table.weight.grad.abs().sum() > 0
    assert logits_of(table, data.inputs).shape == (7, 5, len(WORDS))


def test_nothing_to_predict_is_refused():
    model, data = gpt2(), toy_data(2)
    nothing = torch.full_like(data.targets, -100)
    with pytest.raises(DataError, match="none of the 10 targets is 0 or above"):
        token_loss(model, data.inputs, nothing)
    with pytest.raises(DataError, match="2 windows without a single target"):
        held_out_loss(model, Data(data.inputs, nothing, data.ids))
    with pytest.raises(DataError, match="0 windows without a single target"):
        held_out_loss(model, data.select(torch.arange(0)))
    with pytest.raises(DataError, match=r"logits of shape \(2, 5, .*targets of shape \(2, 4\)"):
        token_loss(model, data.inputs, data.targets[:, 1:])
    with pytest.raises(SettingError, match="batch_size: 0"):
        held_out_loss(model, data, 0)


def test_measuring_leaves_modes_gradients_and_randomness_alone():
    class Noisy(nn.Module):
        """Draws from the global generator whatever its mode is."""

        def __init__(self):
            super().__init__()
            self.model = gpt2(resid_pdrop=0.5)

        def forward(self, ids):
            return self.model(ids).logits + torch.randn(())

    model, data = Noisy().train(), toy_data()
    model.model.transformer.h[0].attn.eval()
    modes = [module.training for module in model.modules()]
    before, weights = torch.get_rng_state(), [parameter.detach().clone() for parameter in model.parameters()]
    first, second = held_out_loss(model, data), held_out_loss(model, data)
    assert first == second
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert all(torch.equal(now, then) and now.grad is None for now, then in zip(model.parameters(), weights, strict=True))


def test_modes_are_restored_after_an_error():
    model = gpt2().train()
    state = torch.get_rng_state()

    def fail():
        with evaluating(model):
            assert not torch.is_grad_enabled()
            assert not model.training
            torch.rand(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.is_grad_enabled()
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_windows_of_a_loaded_folder_are_measured(tmp_path):
    gpt2().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    data = windows(SENTENCES, load_tokenizer(tmp_path), 6, "sentences")
    assert 0 < held_out_loss(load_language_model(tmp_path), data) < 2 * math.log(len(WORDS))
