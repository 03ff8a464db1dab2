"""The attention span of other people's models."""

import copy

import pytest
import torch
import transformers
from families import FAMILIES, build, output

from metactl import AttachError
from metactl.adapters import find_adapters, hold_span
from metactl.adapters.span import AttentionSpanKnob, narrowed
from metactl.adapters.trial import make_trial

TOKENS = torch.arange(20)[None]
NARROW = [name for name in FAMILIES if name != "gemma3"]  # whose six layers reach everywhere


def span_of(model, longest=None):
    return AttentionSpanKnob(model, make_trial(model), longest)


def reached(model, n_tokens=20):
    """The positions whose output depends on the first token."""
    ids = torch.arange(n_tokens)[None]
    with torch.no_grad():
        a, b = model(ids).logits, model(ids.index_fill(1, torch.tensor([0]), 31)).logits
    return [i for i in range(n_tokens) if not torch.allclose(a[0, i], b[0, i], atol=1e-6)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", NARROW)
def test_a_token_reaches_span_minus_one_further_per_layer(family, attention):
    model = build(family, attention).eval()
    assert reached(model) == list(range(20))
    span = span_of(model)
    span.write(5.5)  # six tokens, itself included
    assert reached(model) == list(range(11))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_caches_stay_what_they_are(family, attention):
    model = build(family, attention).eval()
    span_of(model).write(5.0)
    torch.manual_seed(1)
    ids = torch.randint(3, 32, (2, 20))
    mask = torch.ones_like(ids)
    mask[:, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, position_ids=positions).logits[:, 6:]
        alone = model(ids[:, 6:]).logits
        cached = model(ids[:, :12], use_cache=True)
        rest = model(ids[:, 12:], past_key_values=cached.past_key_values, use_cache=True).logits
        whole = model(ids).logits
    assert torch.allclose(padded, alone, atol=1e-5)
    assert torch.allclose(rest, whole[:, 12:], atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_span_is_tried_and_full_span_leaves_no_trace(family, attention):
    model = build(family, attention)
    before, config = output(model), model.config.to_dict()
    optimizer = torch.optim.AdamW(model.parameters())
    (span,), missing = find_adapters(["attention_span"], model, optimizer)
    assert missing == {}
    assert (span.knob.low, span.knob.high, span.read()) == (4.0, 64.0, 64.0)
    span.write(5.0)
    assert not torch.equal(output(model), before)
    span.restore()
    span.close()
    assert torch.equal(output(model), before)
    assert model.config.to_dict() == config
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_checkpoint_carries_the_span(family, tmp_path):
    model = build(family).eval()
    span = span_of(model)
    span.write(5.5)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    native = torch.equal(output(again), output(model))
    assert native == (family == "mistral")  # whose config has a window for all layers
    hold_span(again)
    assert torch.equal(output(again), output(model))
    held = span_of(again)
    assert (held.read(), held.knob.high) == (5.5, 64.0)
    held.write(64.0)
    assert reached(again) == list(range(20))


def test_a_span_that_stays_after_detaching_is_found_again():
    model = build("llama").eval()
    first = span_of(model)
    first.write(5.0)
    first.close()
    second = span_of(model)
    assert second.read() == 5.0
    assert reached(model) == list(range(9))
    copied = copy.deepcopy(model)
    second.write(64.0)
    assert reached(model) == list(range(20))
    assert reached(copied) == list(range(9))


def test_a_window_of_the_model_bounds_the_span():
    config = copy.deepcopy(FAMILIES["mistral"])
    config.sliding_window = 8
    model = transformers.MistralForCausalLM(config).eval()
    span = span_of(model)
    assert span.knob.high == 8.0
    span.write(6.0)
    assert model.config.sliding_window == 6
    span.restore()
    assert model.config.sliding_window == 8
    assert reached(model) == list(range(15))


def test_a_window_that_did_not_follow_is_what_is_in_force():
    """As compiled training leaves it: the config carries a span that the model's window is not."""
    config = copy.deepcopy(FAMILIES["mistral"])
    config.sliding_window, config.attention_span, config.attention_span_longest = 32, 5.5, 64.0
    model = transformers.MistralForCausalLM(config).eval()
    before = output(model)
    span = span_of(model)
    assert (span.read(), span.knob.high) == (32.0, 64.0)
    assert torch.equal(output(model), before)


def test_the_longest_sequence_is_that_of_the_example():
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    for example in (TOKENS, {"input_ids": TOKENS}):
        (span,), _ = find_adapters(["attention_span"], model, optimizer, example)
        assert span.knob.high == 20.0
        span.close()


def test_what_cannot_be_narrowed_is_refused():
    with pytest.raises(AttachError, match="no causal attention layers"):
        span_of(torch.nn.Linear(2, 2))
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    with pytest.raises(AttachError, match="no causal attention layers"):
        span_of(bert)
    model = build("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(
        AttachError, match="eager or sdpa attention, the model has 'flex_attention'"
    ):
        span_of(model)


@pytest.mark.parametrize(("family", "late"), [("llama", False), ("mistral", True), ("gpt2", True)])
def test_moving_a_compiled_model_compiles_twice_at_most(family, late):
    torch._dynamo.reset()
    model = build(family, "sdpa").eval()
    compiled = torch.compile(model, backend="aot_eager")
    if late:  # compiled before the hooks came
        compiled(TOKENS).logits.sum().backward()
    span = span_of(compiled)
    span.verify()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for value in (64.0, *range(4, 18), 64.0, 5.5):
            span.write(value)
            logits = compiled(TOKENS).logits
            logits.sum().backward()
            assert torch.allclose(logits, model(TOKENS).logits, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16])
def test_masks_of_every_kind_are_narrowed_alike(kind):
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    lowest = None if kind == torch.bool else torch.finfo(kind).min
    mask = causal
    if lowest is not None:
        mask = torch.zeros(causal.shape, dtype=kind).masked_fill(~causal, lowest)
    made = narrowed(mask, torch.tensor(2.0))
    assert made.dtype == kind
    expected = causal.triu(-1)
    assert torch.equal(made if lowest is None else made == 0, expected)


def test_a_mask_that_the_next_batch_is_written_into_is_read_anew():
    model = build("llama").eval()
    span_of(model).write(8.0)
    ids = torch.arange(16)[None]
    lowest = torch.finfo(torch.float32).min
    causal = torch.zeros(1, 1, 16, 16).masked_fill(torch.ones(16, 16).triu(1).bool(), lowest)
    packed = causal.clone()
    packed[..., 8:, :8] = lowest  # two documents
    buffer = causal.clone()
    with torch.no_grad():
        first = model(ids, attention_mask=buffer).logits
        expected = model(ids, attention_mask=packed).logits
        buffer.copy_(packed)
        assert torch.equal(model(ids, attention_mask=buffer).logits, expected)
    assert not torch.equal(first, expected)
