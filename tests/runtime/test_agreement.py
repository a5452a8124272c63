"""Agreement and KL divergence of two bundles, against PyTorch and against itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.engines.errors import BackendError, LlavaDeployError, PromptError
from llava_deploy.engines.manifest import EMBEDDING_TABLE
from llava_deploy.exporter.demo.questions import drawn_questions
from llava_deploy.runtime import Llava
from llava_deploy.runtime.agreement import Agreement, AgreementMeter, Reference, kl_divergence, log_softmax
from llava_deploy.runtime.comparison import BundleReport, Comparison
from llava_deploy.runtime.evaluation import AskedBatch, EvalOptions, evaluate
from llava_deploy.runtime.tokenize import tokenize_prompt

Changed = Callable[[Path, Path, str, Callable[[Path], object]], Path]
QUESTIONS = drawn_questions(2, 0)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise(table: np.ndarray) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(table.shape) * 3 * table.std()).astype(table.dtype)


@pytest.fixture(scope="module")
def perturbed(demo_bundle: Path, changed: Changed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo bundle with noise on its token embeddings."""

    def change(path: Path) -> None:
        table = np.load(path)
        np.save(path, table + noise(table))

    return changed(demo_bundle, tmp_path_factory.mktemp("perturbed") / "bundle", EMBEDDING_TABLE, change)


def compared(bundles: Sequence[Path], batch: int = 5) -> list[BundleReport]:
    with closing(Comparison(bundles, QUESTIONS, EvalOptions(batch=batch))) as comparison:
        return [comparison.ask(Llava.load(bundle, threads=1)) for bundle in bundles]


def near(report: BundleReport) -> Agreement:
    assert report.against_first is not None
    return report.against_first


@pytest.mark.parametrize("batch", [1, 4])
def test_a_bundle_agrees_with_itself(batch: int, demo_bundle: Path) -> None:
    first, second = compared([demo_bundle, demo_bundle], batch)
    assert first.against_first is None
    assert near(second).tokens > 2 * len(QUESTIONS)
    assert (near(second).share, near(second).mean_kl) == (1.0, 0.0)
    assert first.report.outcomes == second.report.outcomes


def torch_log_probs(model: Any, llava: Llava, asked: AskedBatch, index: int) -> torch.Tensor:
    """After each prefix of one answer, from one run of transformers' LLaVA over all of it: ``[tokens, vocab]``."""
    manifest = llava.manifest
    ids: list[int] = []
    for token in tokenize_prompt(asked.prompts[index], llava.encoder.tokenizer, manifest.chat).tolist():
        placeholder = token in (IMAGE_TOKEN_INDEX, manifest.chat.image_token_id)
        ids += [model.config.image_token_id] * manifest.vision.patches if placeholder else [token]
    answer = list(asked.answers[index].token_ids)
    (picture,) = asked.pictures[index]
    assert isinstance(picture, Image.Image)
    pixels = torch.from_numpy(llava.encoder.pixels([picture])).to(model.dtype)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids + answer[:-1]]), pixel_values=pixels).logits[0]
    return logits[len(ids) - 1 :].double().log_softmax(-1)


def torch_agreement(first: Any, second: Any, llava: Llava) -> Agreement:
    batches: list[AskedBatch] = []
    evaluate(llava, QUESTIONS, EvalOptions(batch=len(QUESTIONS)), on_batch=batches.append)
    (asked,) = batches
    rows = range(len(QUESTIONS))
    want, found = (torch.cat([torch_log_probs(m, llava, asked, row) for row in rows]) for m in (first, second))
    kl = functional.kl_div(found, want, log_target=True, reduction="none").sum(-1)
    return Agreement(len(want), int((want.argmax(-1) == found.argmax(-1)).sum()), float(kl.mean()))


def torch_model(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype, attn_implementation="eager").eval()


def test_a_perturbed_bundle_disagrees_as_much_as_in_pytorch(
    demo_bundle: Path, demo_checkpoint: Path, perturbed: Path
) -> None:
    _, second = compared([demo_bundle, perturbed])
    model, other = torch_model(demo_checkpoint), torch_model(demo_checkpoint)
    with torch.no_grad():
        table = other.get_input_embeddings().weight
        other.get_output_embeddings().weight = torch.nn.Parameter(other.get_output_embeddings().weight.clone())
        table += torch.from_numpy(noise(table.numpy()))
    want = torch_agreement(model, other, Llava.load(demo_bundle, threads=1))
    assert (near(second).tokens, near(second).agreeing) == (want.tokens, want.agreeing)
    assert near(second).share < 1
    assert near(second).mean_kl == pytest.approx(want.mean_kl, rel=1e-3)


def test_fp16_is_as_near_to_fp32_as_in_pytorch(
    demo_bundle: Path, demo_bundle_fp16: Path, demo_checkpoint: Path
) -> None:
    first, second = compared([demo_bundle, demo_bundle_fp16])
    models = [torch_model(demo_checkpoint, dtype) for dtype in (torch.float32, torch.float16)]
    want = torch_agreement(*models, Llava.load(demo_bundle, threads=1))
    assert near(second).tokens == near(second).agreeing == want.tokens
    # The two round at different places: the size of the error is what can be equal.
    assert want.mean_kl / 10 < near(second).mean_kl < want.mean_kl * 10 < 1e-3
    assert second.weight_bytes == pytest.approx(first.weight_bytes / 2, rel=0.05)
    assert (first.precision, second.precision, second.quantization) == ("fp32", "fp16", None)


def test_a_batch_is_compared_as_its_questions_are(demo_bundle: Path, perturbed: Path) -> None:
    alone, together = (near(compared([demo_bundle, perturbed], batch)[1]) for batch in (1, 7))
    assert (alone.tokens, alone.agreeing) == (together.tokens, together.agreeing)
    assert alone.mean_kl == pytest.approx(together.mean_kl, rel=1e-3)


def test_reading_along_leaves_a_conversation_right(demo_bundle: Path) -> None:
    """The cache is shared with answers: what was read must not be taken for what was said."""
    llava, fresh = Llava.load(demo_bundle, threads=1), Llava.load(demo_bundle, threads=1)
    picture, prompt = QUESTIONS[0].picture, "USER: <image>\nWhat is in the picture? ASSISTANT:"
    said = llava.generate([prompt], [[picture]], max_new_tokens=8)[0]
    read = [logits.copy() for logits in llava.logits_along([prompt], [[picture]], [[7, 8, 9]])]
    assert [logits.argmax() for logits in read[:1]] == [said.token_ids[0]]
    again = llava.generate([prompt + said.text + " USER: And"], [[picture]], max_new_tokens=8)[0]
    want = fresh.generate([prompt + said.text + " USER: And"], [[picture]], max_new_tokens=8)[0]
    assert again.token_ids == want.token_ids
    assert again.timings.reused_tokens > 0


def test_reading_gives_way_to_an_answer(demo_bundle: Path) -> None:
    llava = Llava.load(demo_bundle, threads=1)
    reading = llava.logits_along(["one"], None, [[7, 8]])
    next(reading)
    llava.generate(["two"], max_new_tokens=1)
    with pytest.raises(BackendError, match="another answer was started"):
        next(reading)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([[1]], "answers: want one a prompt, 2, got 1"),
        ([[1], []], "answer 1: want 1 to"),
        ([[1] * 9999, [1]], "answer 0: want 1 to"),
        ([[99999, 1], [1, 1]], "token id 99999 is outside the vocabulary"),
    ],
)
def test_answers_that_cannot_be_read(answers: list[list[int]], said: str, demo_bundle: Path) -> None:
    with pytest.raises(PromptError, match=said):
        list(Llava.load(demo_bundle, threads=1).logits_along(["one", "two"], None, answers))


def test_divergence_of_random_distributions() -> None:
    generator = np.random.default_rng(1)
    logits = generator.standard_normal((2, 50, 300)).astype(np.float32) * 5
    first, second = (log_softmax(rows) for rows in logits)
    want = functional.kl_div(
        torch.from_numpy(logits[1]).double().log_softmax(-1),
        torch.from_numpy(logits[0]).double().log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    np.testing.assert_allclose(kl_divergence(first, second), want.numpy(), rtol=1e-5)
    assert (kl_divergence(first, first) == 0).all()
    assert (kl_divergence(first, first + np.float32(1e-6)) >= 0).all()


def test_divergence_where_a_probability_is_zero() -> None:
    half, certain = np.log([[0.5, 0.5]], dtype=np.float32), np.array([[0.0, -np.inf]], np.float32)
    assert kl_divergence(certain, half)[0] == pytest.approx(np.log(2))
    assert kl_divergence(half, certain)[0] == np.inf
    assert kl_divergence(certain, certain)[0] == 0


def test_logits_that_are_no_numbers() -> None:
    with pytest.raises(BackendError, match="found nan"):
        log_softmax(np.array([[0.0, 1.0], [np.nan, 0.0]], np.float32))


def test_a_temporary_file_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    llava: Any = SimpleNamespace(logits_along=lambda *_: iter([np.zeros((1, 4), np.float32)]))
    asked = AskedBatch(["x"], [[]], [SimpleNamespace(token_ids=(1,))])  # type: ignore[list-item]
    with closing(Reference()) as reference:
        monkeypatch.setattr(reference, "_file", SimpleNamespace(write=Full().write, close=reference._file.close))
        with pytest.raises(LlavaDeployError, match=r"No space left on device.*TMPDIR"):
            reference.record(llava, asked)


def test_more_than_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    llava: Any = SimpleNamespace(logits_along=lambda *_: iter([np.zeros((1, 4), np.float32)]))
    wider: Any = SimpleNamespace(logits_along=lambda *_: iter([np.zeros((1, 5), np.float32)]))
    asked = AskedBatch(["x"], [[]], [SimpleNamespace(token_ids=(1,))])  # type: ignore[list-item]
    with closing(Reference()) as reference:
        reference.record(llava, asked)
        with pytest.raises(LlavaDeployError, match="found 16 bytes"):
            AgreementMeter(reference).add(wider, asked)
