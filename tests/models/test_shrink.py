"""Deployment at the width in force: the same logits from a smaller model."""

import pytest
import torch

from models import AdaptiveTransformer, TransformerConfig
from models.cache import KeyValueCache
from models.rotary import rotation_names

WIDTHS = (0.25, 0.5, 0.75, 1.0)


def build(width, rotation="rope", n=1, **options):
    sliced = options.pop("sliced", None)
    shape = {"d_model": 32, "n_heads": 4, "context": 12, "rope_base": 100.0, **options}
    config = TransformerConfig(rotation=rotation, **shape)
    model = AdaptiveTransformer(config, n, dtype=torch.float64, sliced=sliced)
    model.initialise(list(range(n)), [5 + i for i in range(n)])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("rotation.") and not parameter.any():
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    model.set_knobs({"embedding_width": width, "attention_span": 7.0, "dropout": 0.2})
    model.knobs.settle_gates(list(range(n)))
    return model


def tokens(n=1):
    return torch.randint(0, 256, (n, 2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rotation", rotation_names())
@pytest.mark.parametrize("width", [0.25, 0.75])
def test_a_shrunk_model_has_the_same_logits_and_fewer_parameters(rotation, width):
    model = build(width, rotation)
    before, n_parameters = model(tokens()), model.count_parameters()
    assert model.shrink_() is model
    torch.testing.assert_close(model(tokens()), before, atol=1e-12, rtol=0)
    assert model.count_parameters() < n_parameters * width * 1.05
    assert (model.config.d_model, model.config.n_heads) == (round(32 * width), round(4 * width))


@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
def test_populations_shrink_where_all_replicas_share_a_width(feed_forward):
    model = build(0.5, n=3, sliced=False, feed_forward=feed_forward)
    before = model(tokens(3))
    model.shrink_()
    torch.testing.assert_close(model(tokens(3)), before, atol=1e-12, rtol=0)


def test_a_shrunk_model_keeps_its_other_knobs_and_its_lower_widths():
    model, whole = build(0.75), build(0.5)
    values = {k: v.tolist() for k, v in model.knobs.values().items() if k != "embedding_width"}
    model.shrink_()
    assert model.config.width_levels == pytest.approx((1 / 3, 2 / 3, 1.0))
    found = {k: v.tolist() for k, v in model.knobs.values().items()}
    assert found.pop("embedding_width") == [1.0] and found == values
    model.set_knobs({"embedding_width": 2 / 3})
    model.knobs.settle_gates([0])
    torch.testing.assert_close(model(tokens()), whole(tokens()), atol=1e-12, rtol=0)


def test_a_shrunk_model_learns_generates_and_is_saved():
    model = build(0.5)
    model.embedding.requires_grad_(False)
    model.eval()
    model.shrink_()
    assert not model.embedding.requires_grad and not model.training
    model(tokens()).sum().backward()
    assert model.unembedding.grad is not None and model.embedding.grad is None
    assert model.generate(tokens()[:, :, :4], 5).shape == (1, 2, 9)
    again = AdaptiveTransformer(model.config, dtype=torch.float64)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(tokens()), model(tokens()), atol=0, rtol=0)


def test_what_was_kept_of_the_wider_model_is_computed_again():
    model, cache = build(1.0), KeyValueCache()
    model.set_knobs({"embedding_width": 0.5})
    model(tokens()[..., :6], cache=cache)  # before the width has faded
    model.knobs.settle_gates([0])
    model.shrink_()
    assert model.knobs.version > cache.version
    wanted = model(tokens())[:, :, 6:]
    found = model(tokens()[..., 6:], cache=cache)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_full_width_shrinks_to_itself():
    model = build(1.0)
    before, n_parameters = model(tokens()), model.count_parameters()
    model.shrink_()
    assert model.count_parameters() == n_parameters
    assert torch.equal(model(tokens()), before)


def test_what_cannot_shrink_says_why():
    mixed = build([0.5, 1.0], n=2, sliced=False)
    with pytest.raises(ValueError, match="different widths"):
        mixed.shrink_()
    fading = build(1.0)
    fading.set_knobs({"embedding_width": 0.5})
    fading.knobs.step_gates(0.2)
    with pytest.raises(ValueError, match="still fades"):
        fading.shrink_()
