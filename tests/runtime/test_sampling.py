"""Tokens are drawn from what transformers' logits processors leave, whatever rows are beside a row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_deploy.engines.errors import BackendError, ContractError, InputError
from llava_deploy.runtime.drawing import distribution
from llava_deploy.runtime.sampling import GREEDY, Sampler, SamplingOptions, penalise


def expected_probabilities(logits, history, options):
    """The probabilities [vocab] that transformers' ``generate`` would draw from."""
    steps = LogitsProcessorList()
    if options.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.temperature != 1:
        steps.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k is not None:
        steps.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None and options.top_p < 1:
        steps.append(TopPLogitsWarper(options.top_p))
    scores = torch.from_numpy(logits[None].astype(np.float64))
    return steps(torch.tensor([history]), scores).softmax(-1)[0].numpy()


def penalised(logits, history, options):
    scores = logits.copy()
    penalise(scores, np.unique(history), options.repetition_penalty)
    return scores


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.integers(2, 400),
    spread=st.sampled_from([0.01, 1.0, 5.0, 30.0]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.9]),
    top_k=st.one_of(st.none(), st.integers(1, 500)),
    top_p=st.one_of(st.none(), st.floats(0.01, 1.0)),
    penalty=st.sampled_from([1.0, 1.3, 0.5]),
)
def test_the_distribution_is_that_of_transformers(seed, vocab, spread, temperature, top_k, top_p, penalty):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(vocab) * spread).astype(np.float32)
    history = rng.integers(0, vocab, 12).tolist()
    options = SamplingOptions(temperature, top_k, top_p, penalty)
    ids, probabilities = distribution(penalised(logits, history, options), options)
    got = np.zeros(vocab)
    got[ids] = probabilities
    expected = expected_probabilities(logits, history, options)
    if top_p is not None:
        # Where the sum meets top_p to rounding, the two may draw the line one token apart.
        without = SamplingOptions(temperature, top_k, None, penalty)
        cumulated = np.sort(expected_probabilities(logits, history, without)).cumsum()
        if np.abs(cumulated - (1 - top_p)).min() < 1e-6:
            return
    assert set(ids.tolist()) >= set(np.flatnonzero(expected > 0).tolist())
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-9)


def test_draws_follow_the_distribution():
    options = SamplingOptions(temperature=0.8, top_k=6, top_p=0.9, seed=3)
    logits = np.random.default_rng(1).standard_normal((1, 20)).astype(np.float32)
    ids, probabilities = distribution(logits[0], options)
    sampler = Sampler(options, [[]])
    draws = np.array([sampler.choose(logits)[0] for _ in range(6_000)])
    assert set(draws.tolist()) == set(ids.tolist())
    shares = [(draws == token).mean() for token in ids]
    np.testing.assert_allclose(shares, probabilities, atol=0.025)


def test_a_row_draws_the_same_whatever_is_beside_it():
    options = SamplingOptions(temperature=1.0, top_p=0.95, repetition_penalty=1.2, seed=11)
    steps = np.random.default_rng(0).standard_normal((30, 3, 50)).astype(np.float32) * 2
    history = [[1, 2], [3], [4, 5, 6]]
    together = Sampler(options, history)
    drawn = np.array([together.choose(step) for step in steps])
    for row in range(3):
        alone = Sampler(options, history[row : row + 1])
        again = [alone.choose(step[row : row + 1])[0] for step in steps]
        assert drawn[:, row].tolist() == again
    assert len({tuple(drawn[:, row]) for row in range(3)}) == 3


def test_seeds_repeat_and_differ():
    logits = np.zeros((1, 1000), np.float32)

    def draws(seed):
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed), [[]])
        return [sampler.choose(logits)[0] for _ in range(8)]

    assert draws(5) == draws(5)
    assert draws(5) != draws(6)
    assert draws(None) != draws(None)


def test_greedy_is_argmax_and_the_lowest_of_equals():
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (6, 40)).astype(np.float32)
    logits.setflags(write=False)
    assert Sampler(GREEDY, [[]] * 6).choose(logits) == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    ("history", "columns", "chosen"),
    [([0, 0, 0, -200, 999], slice(None), 1), (np.array([0, 1]), slice(None), 0), ([0], slice(2, None), 1)],
)
def test_the_penalty_counts_each_token_once_in_greedy_too(history, columns, chosen):
    logits = np.array([[2.0, 1.5, -1.0, -1.1]], np.float32)
    kept = logits.copy()
    sampler = Sampler(SamplingOptions(repetition_penalty=1.5), [history])
    assert sampler.choose(logits[:, columns]) == [chosen]
    np.testing.assert_array_equal(logits, kept)


def test_the_penalty_is_on_what_was_chosen_too():
    logits = np.random.default_rng(0).standard_normal((1, 600)).astype(np.float32) + 9
    sampler = Sampler(SamplingOptions(repetition_penalty=1e3), [[5, 5]])
    history = [5]
    for _ in range(500):
        scores = penalised(logits[0], history, SamplingOptions(repetition_penalty=1e3))
        assert sampler.choose(logits) == [scores.argmax()]
        history.append(int(scores.argmax()))
    assert len(set(history)) == len(history)


def test_infinitely_unlikely_tokens_are_never_drawn():
    logits = np.full((1, 9), -np.inf, np.float32)
    logits[0, 4] = -50.0
    for options in (GREEDY, SamplingOptions(temperature=2.0, seed=0), SamplingOptions(1.0, 3, 0.5, 1.1, 0)):
        assert Sampler(options, [[4]]).choose(logits) == [4]


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e9])
def test_extreme_temperatures(temperature):
    logits = np.array([[1.0, 3.0, 2.0]], np.float32)
    _, probabilities = distribution(logits[0], SamplingOptions(temperature=temperature))
    assert probabilities.sum() == pytest.approx(1)
    if temperature < 1:
        assert Sampler(SamplingOptions(temperature=temperature), [[]]).choose(logits) == [1]


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(temperature=1.0, top_k=2, seed=0)])
@pytest.mark.parametrize("bad", [[0, np.nan, 1], [0, np.inf, 1], [-np.inf] * 3, [np.nan, np.inf, 0]])
def test_logits_that_are_no_numbers_are_refused(options, bad):
    logits = np.array([[0, 1, 2], bad], np.float32)
    with pytest.raises(BackendError, match=r"row 1: want finite values, found (nan|inf|-inf)"):
        Sampler(options, [[], []]).choose(logits)


def test_logits_must_match():
    sampler = Sampler(GREEDY, [[], []])
    with pytest.raises(ContractError, match=r"want logits \[2, 3\], got \[1, 3\]"):
        sampler.choose(np.zeros((1, 3), np.float32))
    with pytest.raises(ContractError, match=r"want logits \[2, 3\], got \[2, 4\]"):
        sampler.choose(np.zeros((2, 4), np.float32))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"temperature": 10**400},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_k": True},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 10**400},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
        {"seed": 1.5},
    ],
)
def test_options_outside_their_range_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"^{name}: want "):
        SamplingOptions(**wrong)
