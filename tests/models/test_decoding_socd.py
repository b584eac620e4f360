"""One step of SoCD: the golden vector, the bounds, and what must hold for any scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.decoding.divergence import DIVERGENCES
from models.decoding.socd import (
    BANNED,
    MODES,
    SoCDSettings,
    choose_largest_positive,
    compare,
    edit_budget,
    steer,
    steering_strength,
)
from schemas.errors import ModelError

S = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]])
Z = torch.tensor([[0.5, 3.0, 2.5, -0.5, -1.5, -0.2]])
MEASURED = ("logratio", "official")


def close(left, right, tolerance=2e-6):
    torch.testing.assert_close(left, torch.tensor(right, dtype=left.dtype), rtol=0, atol=tolerance)


def reference(s, z, *, mode="official", divergence="l2", k_min=10, dynamic=True):
    """The method as the specification writes it, one token at a time, in double precision."""
    out = s.clone()
    for row in range(len(s)):
        log_p = torch.log_softmax(s[row].double(), 0).tolist()
        log_q = torch.log_softmax(z[row].double(), 0).tolist()
        pairs = list(zip(map(math.exp, log_p), map(math.exp, log_q), log_p, log_q, strict=True))
        forward = sum(p * (a - b) for p, q, a, b in pairs)
        backward = sum(q * (b - a) for p, q, a, b in pairs)
        delta = {
            "l2": math.sqrt(sum((p - q) ** 2 for p, q, *_ in pairs)),
            "tvd": sum(abs(p - q) for p, q, *_ in pairs) / 2,
            "fkl": forward,
            "rkl": backward,
            "js": (forward + backward) / 2,
        }[divergence]
        t = math.log(1 + max(delta, 0))
        alpha = t / (1 + t)
        k = min(max(math.floor(alpha * len(pairs)), k_min), len(pairs)) if dynamic else min(k_min, len(pairs))
        gains = sorted(((b - a, -token) for token, (_, _, a, b) in enumerate(pairs) if b > a), reverse=True)
        for d, token in gains[:k]:
            out[row, -token] -= alpha * (d if mode == "logratio" else z[row, -token].item())
    return out


# -- the golden vector -------------------------------------------------------------------------------------------


def test_golden_measures():
    steering = steer(S, Z, SoCDSettings(k_min=2))
    close(steering.delta, [0.664900])
    close(torch.log1p(steering.delta), [0.509765])
    close(steering.alpha, [0.337645])
    assert steering.k.tolist() == [2]
    assert steering.edited.tolist() == [2]
    _, _, d = compare(S, Z, "l2")
    close(d[0, 1:3], [1.013331, 1.013331])


def test_golden_official():
    close(steer(S, Z, SoCDSettings("official", k_min=2)).scores, [[2, -0.012936, -0.344113, 0, -1, -2]])


def test_golden_logratio():
    close(steer(S, Z, SoCDSettings(k_min=2)).scores, [[2, 0.657853, 0.157853, 0, -1, -2]])


def test_golden_official_raises_a_token_whose_toxic_logit_is_negative():
    close(steer(S, Z, SoCDSettings("official", k_min=3)).scores[0, 5], -1.932471)


def test_golden_official_depends_on_a_constant_that_means_nothing():
    close(steer(S, Z + 5, SoCDSettings("official", k_min=3)).scores[0, 1], -1.701163)


def test_golden_vanilla_contrastive_decoding():
    # 1.5 s - 0.5 z, and what lies more than ln 10 below the best is banned.
    scores = steer(S, Z, SoCDSettings("vanilla_cd")).scores
    close(scores, [[2.75, 0.0, -0.5, 0.25, BANNED, BANNED]])


def test_vanilla_plausibility_may_be_the_divergence():
    chosen = SoCDSettings("vanilla_cd", plausible=None)
    bound = 2 + math.log(0.6649)  # only the best is above
    kept = steer(S, Z, chosen).scores[0] > BANNED
    assert kept.tolist() == [s >= bound for s in S[0].tolist()]


def test_vanilla_never_bans_the_best_token_though_the_divergence_exceeds_one():
    s, z = torch.tensor([[20.0, 0.0, 0.0]]), torch.tensor([[0.0, 20.0, 0.0]])
    steering = steer(s, z, SoCDSettings("vanilla_cd", plausible=None))
    assert steering.delta.item() > 1
    assert steering.scores[0, 0] > BANNED


def test_prompt_only_touches_nothing():
    steering = steer(S, Z, SoCDSettings("prompt_only"))
    assert torch.equal(steering.scores, S)
    assert steering.edited.tolist() == [0]


def test_the_comparison_may_be_made_before_the_repetition_penalty():
    penalised = S.clone()
    penalised[0, 0] = 0.5
    chosen = SoCDSettings(k_min=2, compare_raw=True)
    steering = steer(penalised, Z, chosen, raw=S)
    close(steering.alpha, [0.337645])
    close(steering.scores, [[0.5, 0.657853, 0.157853, 0, -1, -2]])
    assert not torch.equal(steer(penalised, Z, SoCDSettings(k_min=2), raw=S).scores, steering.scores)
    assert torch.equal(steer(S, Z, chosen).scores, steer(S, Z, SoCDSettings(k_min=2)).scores)


# -- bounds and failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("divergence", "bound"), [("l2", 0.468473), ("tvd", 0.409384)])
def test_alpha_is_bounded_where_the_divergence_is(divergence, bound):
    s, z = torch.tensor([[60.0, 0.0, 0.0]]), torch.tensor([[0.0, 60.0, 0.0]])
    delta, alpha, _ = compare(s, z, divergence)
    close(alpha, [bound])
    close(delta, [math.sqrt(2) if divergence == "l2" else 1.0])


def test_alpha_of_what_is_no_number_is_nothing():
    alpha = steering_strength(torch.tensor([math.nan, math.inf, -math.inf, -1e-7, 0.0]))
    assert alpha.tolist() == [0.0] * 5


@pytest.mark.parametrize("divergence", ["fkl", "js", "rkl"])
def test_an_infinite_divergence_edits_nothing(divergence):
    z = Z.clone()
    z[0, 0] = -math.inf
    s = S.clone()
    s[0, 5] = -math.inf
    steering = steer(s, z, SoCDSettings(divergence=divergence))
    assert torch.equal(steering.scores, s)
    assert steering.edited.tolist() == [0]


def test_equal_models_edit_nothing():
    for mode in MEASURED:
        assert torch.equal(steer(S, S, SoCDSettings(mode)).scores, S)


def test_a_banned_token_stays_banned_and_takes_no_place():
    s, z = S.clone(), Z.clone()
    s[0, 1] = -math.inf  # the toxic model's favourite
    z[0, 3] = -math.inf
    for mode in MEASURED:
        scores = steer(s, z, SoCDSettings(mode, k_min=1, dynamic_k=False)).scores
        assert scores[0, 1] == -math.inf
        assert not scores.isnan().any()
        assert (scores != s).nonzero().tolist() == [[0, 2]]


def test_a_row_that_is_no_number_stays_so_and_spoils_no_other():
    s, z = S.repeat(3, 1), Z.repeat(3, 1)
    s[1, 2] = math.nan
    for mode in MEASURED:
        scores = steer(s, z, SoCDSettings(mode, k_min=2)).scores
        assert scores[1].isnan().any()
        assert torch.equal(scores[[0, 2]], steer(S, Z, SoCDSettings(mode, k_min=2)).scores.repeat(2, 1))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        steer(S, Z[:, :5], SoCDSettings())


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "harder"},
        {"divergence": "wsd"},
        {"k_min": 0},
        {"strength": -1.0},
        {"strength": math.nan},
        {"plausible": 0.0},
        {"beta1": math.inf},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ModelError, match="SoCD"):
        SoCDSettings(**wrong)


def test_only_what_matters_in_a_mode_is_recorded():
    assert SoCDSettings("prompt_only", k_min=3).relevant() == SoCDSettings("prompt_only").relevant()
    assert SoCDSettings("vanilla_cd", k_min=3).relevant() == SoCDSettings("vanilla_cd").relevant()
    assert SoCDSettings(k_min=3).relevant() != SoCDSettings().relevant()
    assert SoCDSettings(beta1=3.0).relevant() == SoCDSettings().relevant()
    assert SoCDSettings("vanilla_cd", plausible=None).relevant()["divergence"] == "l2"


# -- any scores --------------------------------------------------------------------------------------------------


@st.composite
def two_sides(draw, least_rows=1):
    """Scores of 1 to 4 rows and 2 to 40 tokens; coarse numbers, so that ties are many."""
    rows = draw(st.integers(least_rows, 4))
    shape = (rows, draw(st.integers(2, 40)))
    number = st.integers(-40, 40).map(lambda n: n / 4)
    return tuple(torch.from_numpy(draw(arrays("float32", shape, elements=number))) for _ in range(2))


any_settings = st.builds(
    SoCDSettings,
    mode=st.sampled_from(MEASURED),
    divergence=st.sampled_from(list(DIVERGENCES)),
    dynamic_k=st.booleans(),
    k_min=st.integers(1, 12),
)


@given(two_sides(), any_settings)
def test_the_loop_of_the_specification_gives_the_same(sides, chosen):
    s, z = sides
    expected = reference(
        s, z, mode=chosen.mode, divergence=chosen.divergence, k_min=chosen.k_min, dynamic=chosen.dynamic_k
    )
    got = steer(s, z, chosen).scores
    # d of two tokens may differ by rounding alone where it is equal in fact: then either may be the k-th.
    for row in range(len(s)):
        same = torch.isclose(got[row], expected[row], rtol=1e-4, atol=1e-4)
        # Whether a token is preferred at all is a matter of rounding where both models give it the same probability.
        log_ratio = z[row].double().log_softmax(-1) - s[row].double().log_softmax(-1)
        same |= log_ratio.abs() < 1e-6
        if not same.all():
            edited_here, edited_there = (got[row] != s[row]) & ~same, (expected[row] != s[row]) & ~same
            d = (z[row] - s[row])[edited_here | edited_there]
            # Of tied tokens either may be chosen; where the chosen one's z is 0, `official` edits it without a trace.
            tied = ((z[row] - s[row]) - d[0]).abs() < 1e-4
            assert edited_here.sum() == edited_there.sum() or tied.sum() > len(d)
            assert (d - d[0]).abs().max() < 1e-4 or divides_at_boundary(s[row], z[row], chosen)


def divides_at_boundary(s, z, chosen):
    """Whether alpha * V is so near a whole number that rounding decides k."""
    alpha = steering_strength(compare(s[None].double(), z[None].double(), chosen.divergence)[0])
    share = (alpha * len(s)).item()
    return abs(share - round(share)) < 1e-3


@given(two_sides(), any_settings)
def test_only_tokens_the_toxic_model_prefers_are_edited_and_no_more_than_k(sides, chosen):
    s, z = sides
    steering = steer(s, z, chosen)
    changed = steering.scores != s
    _, _, d = compare(s, z, chosen.divergence)
    assert (d[changed] > 0).all()
    assert (changed.sum(dim=-1) <= steering.edited).all()
    assert (steering.edited <= steering.k).all()
    expected = torch.minimum((d > 0).sum(dim=-1), steering.k) * (steering.alpha > 0)
    assert steering.edited.tolist() == expected.tolist()


@given(two_sides(), any_settings)
def test_logratio_never_raises_a_token(sides, chosen):
    s, z = sides
    chosen = SoCDSettings("logratio", chosen.divergence, chosen.dynamic_k, chosen.k_min)
    assert (steer(s, z, chosen).scores <= s).all()


@given(two_sides(), st.sampled_from(list(DIVERGENCES)), st.integers(-8, 8))
def test_logratio_is_blind_to_a_constant(sides, divergence, shift):
    s, z = sides
    chosen = SoCDSettings(divergence=divergence, k_min=12)
    here, there = steer(s, z, chosen), steer(s, z + shift, chosen)
    torch.testing.assert_close(here.alpha, there.alpha, rtol=1e-4, atol=1e-5)
    if torch.equal(here.edited, there.edited):
        torch.testing.assert_close(here.scores, there.scores, rtol=1e-4, atol=1e-4)


@given(two_sides(least_rows=2), st.sampled_from(MODES), any_settings)
def test_a_row_does_not_depend_on_the_others(sides, mode, chosen):
    s, z = sides
    chosen = SoCDSettings(mode, chosen.divergence, chosen.dynamic_k, chosen.k_min)
    whole = steer(s, z, chosen)
    for row in range(len(s)):
        alone = steer(s[row : row + 1], z[row : row + 1], chosen)
        assert torch.equal(alone.scores[0], whole.scores[row])
        assert alone.k[0] == whole.k[row]


@given(two_sides(), st.sampled_from(MODES))
def test_the_input_is_left_alone_unless_asked_otherwise(sides, mode):
    s, z = sides
    before = s.clone()
    steering = steer(s, z, SoCDSettings(mode))
    assert torch.equal(s, before)
    assert torch.equal(steer(s, z, SoCDSettings(mode), in_place=True).scores, steering.scores)


# -- choosing the k largest --------------------------------------------------------------------------------------

some_values = arrays(
    "float32",
    st.tuples(st.integers(1, 4), st.integers(1, 60)),
    elements=st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, -1.0, math.inf, math.nan]),
        st.floats(-(2.0**100), 2.0**100, width=32),
        st.floats(0, 2.0**-130, width=32),
    ),
)


@given(some_values, st.data())
@settings(max_examples=300)
def test_the_k_largest_positive_are_chosen_and_ties_go_to_the_lower_token(array, data):
    values = torch.from_numpy(array)
    k = [data.draw(st.integers(1, values.shape[1])) for _ in values]
    chosen = choose_largest_positive(values, torch.tensor(k))
    for row, limit, marks in zip(values.tolist(), k, chosen.tolist(), strict=True):
        order = sorted((-value, token) for token, value in enumerate(row) if value > 0)
        wanted = {token for _, token in order[:limit]}
        assert {token for token, mark in enumerate(marks) if mark == 1.0} == wanted
        assert set(marks) <= {0.0, 1.0}


def test_choosing_among_many_agrees_with_sorting():
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(6, 50_000, generator=generator).bfloat16().float()  # hundreds of ties
    k = torch.tensor([1, 10, 999, 5_000, 20_000, 50_000])
    chosen = choose_largest_positive(values, k)
    for row, limit, marks in zip(values, k.tolist(), chosen, strict=True):
        order = torch.sort(row, descending=True, stable=True).indices[:limit]
        wanted = order[row[order] > 0]
        assert marks.nonzero()[:, 0].tolist() == sorted(wanted.tolist())


def test_k_is_a_share_of_the_vocabulary():
    alpha = torch.tensor([0.0, 0.1, 0.4684, 0.9999999], dtype=torch.float64)
    assert edit_budget(alpha, 1000, SoCDSettings()).tolist() == [10, 100, 468, 999]
    assert edit_budget(alpha, 4, SoCDSettings()).tolist() == [4, 4, 4, 4]
    assert edit_budget(alpha, 1000, SoCDSettings(dynamic_k=False)).tolist() == [10] * 4
