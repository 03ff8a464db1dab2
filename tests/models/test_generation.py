"""Continuing sequences: the cache, sampling, and what is refused."""

import pytest
import torch

from models import AdaptiveTransformer, TransformerConfig
from models.cache import KeyValueCache
from models.generation import sample


def build(rotation="rope", n=2, context=12):
    config = TransformerConfig(
        vocab_size=11, d_model=16, n_heads=4, context=context, rotation=rotation
    )
    model = AdaptiveTransformer(config, n, dtype=torch.float64)
    model.initialise(list(range(n)), [7 + i for i in range(n)])
    return model


def prompt(n=2, batch=3, seq=4):
    return torch.randint(0, 11, (n, batch, seq), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rotation", ["rope", "conditional", "dynamic", "fire+value"])
def test_the_likeliest_continuation_is_the_one_without_a_cache(rotation):
    model, tokens = build(rotation), prompt()
    generated = model.generate(tokens, 8, temperature=0.0)
    for _ in range(8):
        likeliest = model(tokens)[:, :, -1].argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, likeliest), dim=2)
    assert torch.equal(generated, tokens)


def test_generation_goes_on_beyond_the_context_and_keeps_the_prompt():
    model, tokens = build(), prompt()
    generated = model.generate(tokens, 30, generator=torch.Generator().manual_seed(0))
    assert generated.shape == (2, 3, 34)
    assert torch.equal(generated[:, :, :4], tokens)
    assert generated.min() >= 0 and generated.max() < 11
    likeliest, begins = model.generate(tokens, 30, temperature=0.0), 0
    for n in range(4, 34):
        if n - begins > 12:  # full: from here on the latest half of a context
            begins = n - 6
        expected = model(likeliest[:, :, begins:n])[:, :, -1].argmax(-1)
        assert torch.equal(likeliest[:, :, n], expected)


def test_the_same_generator_gives_the_same_text():
    model, tokens = build(), prompt()

    def text(seed):
        return model.generate(tokens, 20, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(text(1), text(1))
    assert not torch.equal(text(1), text(2))


def test_sampling_follows_the_softmax_at_a_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(1, 20_000, 3)
    drawn = sample(logits, 0.5, 1.0, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn.flatten(), minlength=3) / 20_000
    wanted = torch.softmax(torch.tensor([0.0, 2.0, 4.0]), 0)
    torch.testing.assert_close(share, wanted, atol=0.01, rtol=0)


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 5e-324])
def test_a_temperature_of_nearly_nothing_draws_the_likeliest_token(temperature):
    logits = torch.tensor([40.0, 60.0, 50.0]).expand(1, 50, 3)
    drawn = sample(logits, temperature, 1.0, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == {1}


@pytest.mark.parametrize("top_p, kept", [(0.4, 1), (0.5, 1), (0.7, 2), (0.95, 3)])
def test_the_nucleus_holds_the_likeliest_tokens_up_to_its_share(top_p, kept):
    logits = torch.tensor([0.05, 0.5, 0.3, 0.15]).log().expand(1, 4000, 4)
    drawn = sample(logits, 1.0, top_p, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == set([1, 2, 3, 0][:kept])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"max_new_tokens": -2}, "max_new_tokens must be at least 0, got -2"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build().generate(prompt(), **{"max_new_tokens": 3, **arguments})


def test_a_model_that_diverged_is_not_sampled_from():
    model = build()
    with torch.no_grad():
        model.unembedding.fill_(float("nan"))
    with pytest.raises(ValueError, match="The logits are not finite"):
        model.generate(prompt(), 3)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="The logits are not finite"):
            sample(torch.tensor([[[bad, 1.0, 2.0]]]), 0.0, 1.0, None)
    never = torch.tensor([[[-float("inf"), 1.0, -float("inf")]]])
    assert sample(never, 1.0, 1.0, None).item() == 1


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        build().generate(prompt(seq=4)[:, :, :0], 3)


def test_a_full_cache_and_dropout_noise_are_refused():
    from models import Noise

    model, cache = build(), KeyValueCache()
    model(prompt(seq=10), cache=cache)
    with pytest.raises(ValueError, match="1 to 2"):
        model(prompt(seq=3), cache=cache)
    noise = Noise(torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="noise is for training"):
        model(prompt(seq=1), noise, cache)
