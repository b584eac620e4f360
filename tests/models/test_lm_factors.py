"""Adapters as matrices of low rank: one on top of another is one adapter that holds both, for any ranks and places."""

import json

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from models.lm.factors import difference, read_factors, stack_adapters

SIZES = {"q_proj": (6, 4), "v_proj": (3, 4), "down_proj": (4, 5)}
LAYERS = 2
PLACES = [f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in SIZES]

adapters = st.fixed_dictionaries(
    {
        "places": st.sets(st.sampled_from(PLACES), min_size=1),
        "rank": st.integers(1, 3),
        "alpha": st.integers(1, 9),
        "use_rslora": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def save(folder, made):
    """An adapter's folder as peft writes it."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(made["seed"])
    state = {}
    for place in sorted(made["places"]):
        out, inside = SIZES[place.rpartition(".")[2]]
        key = f"base_model.model.{place}.lora_"
        state[f"{key}A.weight"] = torch.randn(made["rank"], inside, generator=generator)
        state[f"{key}B.weight"] = torch.randn(out, made["rank"], generator=generator)
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": made["rank"], "lora_alpha": made["alpha"]}
    config |= {"use_rslora": made["use_rslora"], "target_modules": sorted(made["places"])}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def product(factors, place):
    out, inside = SIZES[place.rpartition(".")[2]]
    return factors[place].up @ factors[place].down if place in factors else torch.zeros(out, inside)


@settings(max_examples=60, deadline=None)
@given(below=adapters, above=adapters)
def test_a_stacked_adapter_adds_what_both_add_and_shares_what_is_below(tmp_path_factory, below, above):
    folder = tmp_path_factory.mktemp("stack")
    first, second = save(folder / "below", below), save(folder / "above", above)
    under, over = read_factors(first), read_factors(second)
    stack_adapters(first, second)
    both = read_factors(second)
    for place in PLACES:
        torch.testing.assert_close(
            product(both, place), product(under, place) + product(over, place), rtol=1e-5, atol=1e-5
        )
    added = difference(both, under)
    assert set(added) == above["places"]  # nowhere else do the two sides differ
    for place in added:
        torch.testing.assert_close(product(added, place), product(over, place), rtol=1e-5, atol=1e-6)
        assert len(added[place].down) == above["rank"]
    ranks = {len(factors.down) for factors in both.values()}
    config = json.loads((second / "adapter_config.json").read_text())
    assert ranks == {config["r"]} and config["lora_alpha"] == config["r"]


@settings(max_examples=40, deadline=None)
@given(left=adapters, right=adapters)
def test_the_difference_is_what_one_adds_less_what_the_other_adds(tmp_path_factory, left, right):
    folder = tmp_path_factory.mktemp("difference")
    one, other = (read_factors(save(folder / n, made)) for n, made in (("one", left), ("other", right)))
    added = difference(one, other)
    for place in PLACES:
        torch.testing.assert_close(
            product(added, place), product(one, place) - product(other, place), rtol=1e-5, atol=1e-5
        )
