"""What is drawn quickly is what float64 over the whole vocabulary gives, token for token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_deploy.runtime.drawing import Drawer, distribution
from llava_deploy.runtime.sampling import SamplingOptions


def plainly(scores: np.ndarray, options: SamplingOptions, random: float) -> int:
    """The draw as it is meant."""
    ids, probabilities = distribution(scores, options)
    reached = probabilities.cumsum()
    return int(ids[min(int(reached.searchsorted(random * reached[-1], side="right")), len(ids) - 1)])


def some_scores(rng: np.random.Generator, vocab: int, spread: float, likely: int) -> np.ndarray:
    """Logits as a model has them: some tokens stand out, some cannot be."""
    scores = (rng.standard_normal(vocab) * spread).astype(np.float32)
    scores[rng.integers(0, vocab, likely)] += 12 * rng.random(likely).astype(np.float32)
    scores[rng.integers(0, vocab, vocab // 50)] = -np.inf
    scores[0] = 0.0
    return scores


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 2, 127, 128, 5000, 32_064]),
    spread=st.sampled_from([0.0, 1.0, 2.0, 6.0]),
    likely=st.integers(0, 20),
    temperature=st.sampled_from([1e-4, 0.01, 0.7, 1.0, 5.0, 1e4]),
    top_k=st.one_of(st.none(), st.integers(1, 60)),
    top_p=st.one_of(st.none(), st.floats(0.01, 1.0)),
    random=st.one_of(st.sampled_from([0.0, 0.5, 1 - 2**-53]), st.floats(0, 1, exclude_max=True)),
)
def test_draws_are_those_of_the_distribution(
    seed: int,
    vocab: int,
    spread: float,
    likely: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    random: float,
) -> None:
    options = SamplingOptions(temperature, top_k, top_p)
    scores = some_scores(np.random.default_rng(seed), vocab, spread, likely)
    scores.setflags(write=False)
    drawer = Drawer(options, vocab)
    assert drawer.draw(scores, random) == drawer.draw(scores, random) == plainly(scores, options, random)


@pytest.mark.parametrize("top_p", [None, 0.9])
def test_the_whole_vocabulary_is_hardly_ever_computed(monkeypatch: pytest.MonkeyPatch, top_p: float | None) -> None:
    import llava_deploy.runtime.drawing as drawing

    sizes: list[int] = []
    weights = drawing._weights

    def counting(scores: np.ndarray, greatest: float, temperature: float) -> np.ndarray:
        sizes.append(len(scores))
        return weights(scores, greatest, temperature)

    monkeypatch.setattr(drawing, "_weights", counting)
    rng = np.random.default_rng(0)
    drawer = Drawer(SamplingOptions(0.8, None, top_p), 32_000)
    for _ in range(40):
        drawer.draw(some_scores(rng, 32_000, 1.0, 20), rng.random())
    assert sum(sizes) < 40 * 32_000 / 4


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_draws_near_a_bound_are_those_of_the_distribution(steps: int) -> None:
    """Where float32 cannot tell which token's share the number falls in, or which token top-p takes away last."""
    rng = np.random.default_rng(steps)
    scores = np.round(some_scores(rng, 4000, 1.0, 5) * 4) / 4  # equal ones, too
    for options in (SamplingOptions(1.0), SamplingOptions(1.0, None, 0.5)):
        drawer = Drawer(options, 4000)
        _, probabilities = distribution(scores, options)
        reached = probabilities.cumsum() / probabilities.sum()
        for edge in reached[rng.integers(0, len(reached), 60)]:
            near = np.array([edge, np.nextafter(edge, 0), edge + steps * 1e-9, edge - steps * 1e-9])
            for random in near.clip(0, np.nextafter(1, 0)):
                assert drawer.draw(scores, float(random)) == plainly(scores, options, float(random))
