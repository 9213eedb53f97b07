"""Feed-forward layers that keep less: the same function, the same gradients, fewer bytes."""

from __future__ import annotations

import pytest
import torch
import transformers
from tersor.ops.distill.nested import nest, unnest
from tiny_models import BASE, FAMILIES, NO_KV

NEOX = ("GPTNeoXForCausalLM", "GPTNeoXConfig", NO_KV)
IDS = torch.randint(5, 256, (2, 24), generator=torch.Generator().manual_seed(2))


def model_of(kind, **changes):
    model_class, config_class, settings = FAMILIES[kind] if isinstance(kind, str) else kind
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings | changes)
    return getattr(transformers, model_class)(config).double().train()


def gradients(model):
    """By parameter, and the bytes that autograd kept of whatever is no parameter."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found, sum(kept.values())


@pytest.mark.parametrize("kind", ["llama", "llama-bias", "gemma", "phi", "gpt-neox"])
def test_the_same_gradients_from_fewer_bytes(kind):
    model = model_of(NEOX if kind == "gpt-neox" else kind)
    wanted, eager = gradients(model)
    assert nest(model) == 2
    ours, nested = gradients(model)
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12)
    numbers = (2 if kind in ("llama", "llama-bias", "gemma") else 1) * BASE["intermediate_size"] * IDS.numel()
    assert eager - nested >= 2 * numbers * 8 * 0.9  # in each of two layers the product, and the activation of a gate
    unnest(model)
    assert gradients(model)[1] == eager


def test_layers_that_compute_something_else_are_left_alone():
    assert nest(model_of("llama", hidden_act="relu")) == 0
    assert nest(model_of("opt")) == 0  # its feed-forward part is written out in the block
    model = model_of("llama")
    module = model.model.layers[0].mlp
    module.forward = lambda x: module.down_proj(torch.nn.functional.silu(module.up_proj(x)) * module.gate_proj(x))
    assert nest(model) == 1


def test_dropout_inside_is_noticed_and_draws_as_before():
    model = model_of("llama")
    module = model.model.layers[1].mlp
    own = module.forward
    module.forward = lambda x: torch.nn.functional.dropout(own(x), 0.5)
    torch.manual_seed(5)
    assert nest(model) == 1
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())
