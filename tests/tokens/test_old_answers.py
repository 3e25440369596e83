"""Old answers stay what they were, bit for bit: while attached, after detaching, after forgetting, and when a pass breaks off."""

import copy

import pytest
import torch
from vision_zoo import KINDS, backbone, images, memory_of, stir, train

from remanence.errors import SettingError
from remanence.tokens import MemoryViT, ViTView
from remanence.tokens.vpt import DeepPrompts


def answers(model, pixels):
    output = model(pixels, output_hidden_states=True)
    main = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return [main, *output.hidden_states]


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_old_answers_are_bit_identical_after_tasks_were_trained(kind, attention, dtype):
    model = backbone(kind, attention=attention).to(dtype)
    untouched = copy.deepcopy(model)
    memory = MemoryViT(model)
    for index, settings in enumerate(({}, {"parents": ["t0"]}, {"mode": "input"}, {"mode": "class"}, {"mode": "head"})):
        memory.add_task(f"t{index}", [0, 1], tokens=3, **settings)
        before = copy.deepcopy(memory.task(f"t{index}").state_dict())
        with torch.enable_grad():
            train(memory, f"t{index}", images(8), torch.arange(8) % 2)
        assert not same(list(before.values()), list(memory.task(f"t{index}").state_dict().values()))
    for batch in (1, 7, 64):
        pixels = images(batch, seed=1).to(dtype)
        output = memory(pixels, output_hidden_states=True)
        main = output.base.logits if hasattr(output.base, "logits") else output.base.last_hidden_state
        assert same([main, *output.base.hidden_states], answers(untouched, pixels))
        assert all(bool(value.isfinite().all()) and value.dtype == dtype for value in output.logits.values())
    assert same(list(model.state_dict().values()), list(untouched.state_dict().values()))


def test_side_stream_in_bf16_is_near_the_one_in_fp32():
    memory = memory_of(backbone(), "a", "b")
    wanted = memory(images(8)).logits
    found = memory.to(torch.bfloat16)(images(8).bfloat16()).logits  # the keys kept from the pass before are of another type
    for name in memory.tasks:
        assert found[name].dtype == torch.bfloat16
        assert (found[name].float() - wanted[name]).abs().max() < 0.1 * wanted[name].abs().max()


def test_detach_gives_the_model_back_as_it_was():
    model = backbone("ViTForImageClassification")
    pixels, before = images(3), answers(backbone("ViTForImageClassification"), images(3))
    model.train()
    model.classifier.eval()
    model.vit.embeddings.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    values = copy.deepcopy(model.state_dict())
    memory = memory_of(model, "a")
    memory.train()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    train(memory, "a", pixels, torch.tensor([0, 1, 0]))
    assert memory.detach() is model
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert same(list(values.values()), list(model.state_dict().values()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks(model) == 0
    with pytest.raises(SettingError, match="training mode"):
        memory(pixels)
    assert same(answers(model.eval(), pixels), before)


@pytest.mark.parametrize("reader", ["memory", "prompts"])
def test_no_hook_stays_when_the_model_breaks_off_in_its_middle(reader):
    model = backbone()
    memory = memory_of(model, "a")
    count = hooks(model)
    prompts = DeepPrompts(ViTView(model), 2)
    handle = model.layers[1].mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    for read in (lambda: memory(images()), lambda: prompts(memory.view, images()), memory.view.class_token):
        with pytest.raises(RuntimeError, match="out of memory"):
            read()
        assert hooks(model) == count + 1
    handle.remove()
    memory(images())
    assert hooks(model) == count == 0


def test_a_model_that_is_refused_stays_as_it_was():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Dropout()).train()
    with pytest.raises(SettingError):
        MemoryViT(model)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_forgetting_the_middle_of_three_leaves_what_never_knew_it():
    pixels = images(7)
    memory, never = memory_of(backbone(), "a", "b", "c"), MemoryViT(backbone())
    apart = {name: memory(pixels, [name]).logits[name] for name in memory.tasks}
    base = memory(pixels).base.last_hidden_state
    for name, classes in (("a", [0, 1]), ("c", [4, 5])):
        never.add_task(name, classes, tokens=3)
        stir(never, name)
    memory.remove_task("b")
    assert memory.tasks == never.tasks == ["a", "c"]
    assert memory.state_dict().keys() == never.state_dict().keys()
    assert same(list(memory.state_dict().values()), list(never.state_dict().values()))
    here, there = memory(pixels), never(pixels)
    assert torch.equal(here.base.last_hidden_state, base)
    for name in ("a", "c"):
        assert torch.equal(here.logits[name], there.logits[name])
        assert (here.logits[name] - apart[name]).abs().max() < 1e-5


def test_gradient_checkpointing_changes_nothing():
    model = backbone()
    wanted = memory_of(backbone(), "a")(images()).logits["a"]
    model.activation_checkpointing_enable()
    memory = memory_of(model, "a")
    assert torch.equal(memory(images()).logits["a"], wanted)
    train(memory, "a", images(), torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize("what", ["layers", "model"])
def test_compiled_models_give_the_same_values(what):
    wanted = memory_of(backbone(), "a")(images())
    model = backbone()
    for module in model.layers if what == "layers" else [model]:
        module.compile(backend="eager")
    found = memory_of(model, "a")(images())
    assert torch.allclose(found.logits["a"], wanted.logits["a"], atol=1e-5)
    assert torch.allclose(found.base.last_hidden_state, wanted.base.last_hidden_state, atol=1e-5)


class Silent(torch.nn.Linear):
    """A layer whose hooks are passed by, as compiled code may do."""

    def __call__(self, hidden):
        return self.forward(hidden)


def test_a_model_that_passes_hooks_by_is_refused():
    model = backbone()
    model.layers[1].attention.k_proj = Silent(16, 16)
    with pytest.raises(SettingError, match=r"layer 1 ran without calling the hooks.*not compiled"):
        memory_of(model, "a")(images())


def test_images_of_another_size_are_answered_where_the_model_interpolates_positions():
    memory = memory_of(backbone(), "a")
    output = memory(images(2, size=12), interpolate_pos_encoding=True)
    assert output.logits["a"].shape == (2, 2)
    assert output.base.last_hidden_state.shape[1] == 37
