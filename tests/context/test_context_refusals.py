"""Settings and calls that are refused, each by its message; defaults, and what a fingerprint depends on."""

import pytest
import torch
from context_models import BOS, SIZES, VOCAB, WINDOW, fresh, ids, shared, start

from remanence.context.configuration import BlockRecurrentConfig, ContextConfig, MelodiConfig, MemorizingConfig, TransformerXLConfig
from remanence.context.melodi import MelodiLM
from remanence.errors import DataError, SettingError

# --- settings that are refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ContextConfig, {"hidden_sise": 8}, r"ContextConfig: there is no setting 'hidden_sise'. Did you mean 'hidden_size'\? Known here: "),
        (MelodiConfig, {"long_window": 8}, r"MelodiConfig: there is no setting 'long_window'. Did you mean 'long_windows'\?"),
        (TransformerXLConfig, {"short": 8}, "TransformerXLConfig: there is no setting 'short'"),
        (ContextConfig, {"vocab_size": 0}, "vocab_size=0 must be 1 or more"),
        (ContextConfig, {"hidden_size": -8}, "hidden_size=-8 must be 1 or more"),
        (ContextConfig, {"num_hidden_layers": 0}, "num_hidden_layers=0 must be 1 or more"),
        (ContextConfig, {"num_attention_heads": 0}, "num_attention_heads=0 must be 1 or more"),
        (ContextConfig, {"window": 0}, "window=0 must be 1 or more"),
        (ContextConfig, {"window": 12.5}, "window=12.5 must be 1 or more, and a whole number"),
        (ContextConfig, {"initial_temperature": 0.0}, "initial_temperature=0.0 must be above 0"),
        (ContextConfig, {"hidden_size": 10, "num_attention_heads": 4}, "hidden_size=10 is no multiple of num_attention_heads=4"),
        (ContextConfig, {"bos_token_id": 300}, "bos_token_id=300 lies outside the vocabulary of 257"),
        (ContextConfig, {"dropout": 1.0}, r"dropout=1.0 lies outside \[0, 1\)"),
        (TransformerXLConfig, {"cache": -64}, "cache=-64 must be 0 or more"),
        (TransformerXLConfig, {"cache": 65}, "cache=65 is no multiple of window=64"),
        (MemorizingConfig, {"memory": 0}, "memory=0 must be 1 or more"),
        (MemorizingConfig, {"memory": 100}, "memory=100 is no multiple of window=64"),
        (MemorizingConfig, {"memory_layer": 4}, "memory_layer=4 is no layer of 4; they are counted from 0"),
        (BlockRecurrentConfig, {"states": 0}, "states=0 must be 1 or more"),
        (BlockRecurrentConfig, {"recurrent_layer": -1}, "recurrent_layer=-1 is no layer of 4"),
        (MelodiConfig, {"short": -1}, "short=-1 must be 0 or more"),
        (MelodiConfig, {"long_per_window": -1}, "long_per_window=-1 must be 0 or more"),
        (MelodiConfig, {"long_windows": -1}, "long_windows=-1 must be 0 or more"),
        (MelodiConfig, {"long_layers": [1, 7]}, "long_layers=7 is no layer of 4"),
        (MelodiConfig, {"gate": "open"}, "gate='open' is unknown; choose one of static, token"),
        (MelodiConfig, {"empty": "skip"}, "empty='skip' is unknown; choose one of mask, zero"),
        (MelodiConfig, {"summary": 0}, "summary=0 writes no memory; give summary tokens, or set short=0"),
        (MelodiConfig, {"summary": 3, "branching": False}, "short=12 must equal summary=3"),
    ],
)
def test_settings_that_are_refused(kind, settings, message):
    with pytest.raises(SettingError, match=message):
        kind(**settings)


def test_settings_have_the_defaults_that_the_specification_names():
    config = MelodiConfig()
    assert (config.window, config.short, config.summary, config.long_per_window, config.long_windows) == (64, 12, 12, 8, 64)
    assert (config.bos_token_id, config.vocab_size, config.head_size, config.queue) == (256, 257, 32, 512)
    assert (config.gate, config.empty, config.attend_self, config.long_layers) == ("static", "mask", False, [2])
    assert MelodiConfig(short=0).summary == 8
    assert MelodiConfig(short=0, long_per_window=0).summary == 0
    assert MelodiConfig(long_layers=(3, 1, 1)).long_layers == [1, 3]
    assert MelodiConfig(vocab_size=50).bos_token_id == 49


@pytest.mark.parametrize(
    ("kind", "changes", "same"),
    [
        (MelodiConfig, {"dropout": 0.1}, True),
        (MelodiConfig, {"gate": "token"}, True),
        (MelodiConfig, {"short": 11}, False),
        (MelodiConfig, {"summary": 3}, False),
        (MelodiConfig, {"long_layers": [1]}, False),
        (TransformerXLConfig, {"cache": 128}, False),
        (MemorizingConfig, {"memory": 128}, False),
        (MemorizingConfig, {"memory_layer": 1}, False),
        (BlockRecurrentConfig, {"states": 3}, False),
        (BlockRecurrentConfig, {"recurrent_layer": 1}, False),
        (ContextConfig, {"bos_token_id": 3}, False),
    ],
)
def test_fingerprints_are_of_what_a_state_depends_on(kind, changes, same):
    assert (kind().fingerprint() == kind(**changes).fingerprint()) is same
    assert kind().fingerprint() == kind().fingerprint()


def test_fingerprints_of_all_kinds_differ():
    kinds = (MelodiConfig, TransformerXLConfig, MemorizingConfig, BlockRecurrentConfig, ContextConfig)
    assert len({kind().fingerprint() for kind in kinds}) == len(kinds)


# --- calls that are refused ----------------------------------------------------------------------------------------------------


def test_states_that_are_refused():
    model = shared("melodi")
    with pytest.raises(DataError, match="batch=-1; give 0 rows or more"):
        model.init_state(-1)
    with pytest.raises(DataError, match=r"memory in torch.float16 leaves its range .* use float32 or bfloat16"):
        model.init_state(1, dtype=torch.float16)
    for read in (model, model.step):
        tokens = ids(2, 3, "refused")
        with pytest.raises(DataError, match=r"a dict \(no context state\) for 2 rows of a MelodiLM with windows of 4"):
            read(tokens, {})
        with pytest.raises(DataError, match=r"\(3 rows, short 3x2x8, .*\) for 2 rows .* take it from this model's init_state\(2\)"):
            read(tokens, start(model, 3))
        with pytest.raises(DataError, match=r"a TransformerXLState \(2 rows, keys .*\) for 2 rows of a MelodiLM"):
            read(tokens, start(shared("transformer-xl"), 2))
        with pytest.raises(DataError, match=r"a MelodiState \(2 rows, .* tail 8\) for 2 rows of a MelodiLM .*\(.* tail 4\)"):
            read(tokens, start(fresh("melodi", window=8), 2))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("melodi", {"long_windows": 5}), ("melodi", {"short": 1, "summary": 2}), ("melodi", {"long_per_window": 1}),
        ("memorizing", {"memory": 5 * WINDOW}), ("block-recurrent", {"states": 1}), ("transformer-xl", {"cache": 0}),
    ],
)  # fmt: skip
def test_states_of_other_sizes_are_refused(name, sizes):
    other = fresh(name, **sizes)
    with pytest.raises(DataError):
        shared(name)(ids(1, WINDOW, "sizes"), start(other, 1))


def test_memory_in_float16_is_refused_wherever_it_comes_from():
    with pytest.raises(DataError):
        start(shared("melodi"), 1).to(dtype=torch.float16)


PLAIN = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tokens", "named", "message"),
    [
        (PLAIN[0], {}, r"tokens: \(3,\) of torch.int64; give ids \(B, T\) as int64"),
        (PLAIN.float(), {}, r"tokens: \(2, 3\) of torch.float32"),
        (PLAIN.int(), {}, r"tokens: \(2, 3\) of torch.int32"),
        (PLAIN - 1, {}, "ids -1 to -1, the vocabulary has 0 to 10; pad with any id and give lengths"),
        (torch.tensor([[BOS, VOCAB]]), {}, "ids 10 to 11, the vocabulary has 0 to 10"),
        (PLAIN, {"lengths": torch.tensor([3])}, r"lengths: \[3\] for tokens \(2, 3\); give an int64 for each row"),
        (PLAIN, {"lengths": torch.tensor([3, 4])}, r"lengths: \[3, 4\] .* between 0 and 3"),
        (PLAIN, {"lengths": [3, 3]}, r"lengths: \[3, 3\] for tokens \(2, 3\); give an int64 for each row"),
        (PLAIN, {"lengths": torch.tensor([-1, 3])}, r"lengths: \[-1, 3\]"),
        (PLAIN, {"reset": PLAIN[:, 0].bool()}, r"reset: \(2,\) of torch.bool for tokens \(2, 3\)"),
        (PLAIN, {"reset": PLAIN.float()}, r"reset: \(2, 3\) of torch.float32 .* give a bool for each token"),
    ],
)
def test_tokens_that_are_refused(tokens, named, message):
    with pytest.raises(DataError, match=message):
        shared("windowed")(tokens, **named)


def test_losses_that_are_refused():
    model, tokens = MelodiLM(MelodiConfig(**SIZES)), ids(2, 3, "loss")
    with pytest.raises(DataError, match=r"targets \(2, 2\) of torch.int64 for tokens \(2, 3\); give an int64 id below \d+ for each token"):
        model.loss(tokens, tokens[:, :2])
    for wrong in (tokens.float(), torch.full_like(tokens, model.config.vocab_size)):
        with pytest.raises(DataError, match=r"targets \(2, 3\) of torch\.\w+ for tokens \(2, 3\); give an int64 id below"):
            model.loss(tokens, wrong)
    for nothing, lengths in ((torch.full_like(tokens, -1), None), (tokens, torch.zeros(2, dtype=torch.int64))):
        with pytest.raises(DataError, match=r"none of the 6 targets is to be counted"):
            model.loss(tokens, nothing, lengths=lengths)


def test_targets_of_padding_are_not_counted():
    model, tokens, lengths = MelodiLM(MelodiConfig(**SIZES)), ids(2, 5, "padded"), torch.tensor([5, 2])
    marked = torch.where(torch.arange(5) < lengths[:, None], tokens, -1)
    assert model.loss(tokens, tokens, lengths=lengths)[0] == model.loss(tokens, marked, lengths=lengths)[0]
    assert model.loss(tokens, tokens)[0] != model.loss(tokens, tokens, lengths=lengths)[0]
