"""One golden, stage by stage: each gets what was recorded of the one before it, so that one fault is one failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava_deploy.engines.errors import LlavaDeployError
from llava_deploy.engines.goldens import Golden, GoldenArray, read_golden_array
from llava_deploy.runtime.backend import DecoderSession, VisionSession
from llava_deploy.runtime.bundle import Bundle
from llava_deploy.runtime.chat_template import tells_the_date
from llava_deploy.runtime.encoding import PromptEncoder
from llava_deploy.runtime.generation import logits_along
from llava_deploy.runtime.llava import Llava
from llava_deploy.runtime.new_tokens import NewTokens, splice_rows
from llava_deploy.runtime.pictures import load_picture
from llava_deploy.runtime.prompt import render_chat
from llava_deploy.runtime.selftest.limits import (
    Arithmetic,
    Limits,
    Rounding,
    compared,
    compared_pixels,
    failed,
    moved,
    shift_stage,
)
from llava_deploy.runtime.selftest.report import GoldenStage
from llava_deploy.runtime.selftest.texts import text_difference, token_difference
from llava_deploy.runtime.stages import StageKind, StageResult, position_errors, token_stage
from llava_deploy.runtime.tokenize import tokenize_prompt


@dataclass(frozen=True)
class Recorded:
    """A golden with its files."""

    bundle: Bundle
    golden: Golden

    def array(self, name: GoldenArray) -> np.ndarray:
        """One of its arrays; see :meth:`Golden.shape`."""
        return read_golden_array(self.bundle.directory, self.bundle.manifest, self.golden, name)

    @property
    def pictures(self) -> list[Path]:
        """Files of its pictures."""
        return [self.bundle.path(name) for name in self.golden.pictures]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation, as :meth:`Llava.chat` takes it."""
        pictures = iter(self.pictures)
        return [
            {
                "role": message.role,
                "content": [
                    {"type": "image", "image": next(pictures)}
                    if part.text is None
                    else {"type": "text", "text": part.text}
                    for part in message.content
                ],
            }
            for message in self.golden.messages
        ]

    @property
    def slots(self) -> int:
        """Of the cache, that the prompt and the answer take; its last token is not written."""
        return len(self.array("inputs_embeds")) + len(self.golden.token_ids) - 1


def replay_pixels(one: Recorded, encoder: PromptEncoder) -> StageResult:
    """The picture files, loaded as users load them, to pixels."""
    found = encoder.pixels([load_picture(path) for path in one.pictures])
    return compared_pixels(found, one.array("pixel_values"), one.bundle.manifest.image)


def _features_of(vision: VisionSession, _one: Recorded, pixels: np.ndarray) -> np.ndarray:
    """Pixels, some pictures at a time, to image features ``[pictures, patches, hidden]``."""
    groups = range(0, len(pixels), vision.max_images)
    runs = [run for at in groups for run in vision.encode(np.array(pixels[at : at + vision.max_images]))]
    return np.stack([run if isinstance(run, np.ndarray) else run.numpy() for run in runs])


def replay_prompt(one: Recorded, encoder: PromptEncoder) -> StageResult:
    """The messages to the prompt's text, and the recorded text to token ids."""
    golden, chat = one.golden, one.bundle.manifest.chat
    dated = tells_the_date(chat.template)
    text = None if dated else text_difference(render_chat(one.messages, chat), golden.prompt)
    ids = token_difference(tokenize_prompt(golden.prompt, encoder.tokenizer, chat).tolist(), golden.input_ids)
    said = [f"the text differs from {text}"] if text is not None else []
    said += [f"the ids differ from {ids}"] if ids is not None else []
    if said:
        return StageResult("prompt", "prompt", float(len(said)), float(len(said)), 0.0, "; ".join(said))
    tokens = f"the same {len(golden.input_ids)} tokens"
    note = "the template tells the date: its text is not compared" if dated else f"of {len(golden.prompt)} characters"
    return StageResult("prompt", "prompt", 0.0, 0.0, 0.0, f"{tokens}, {note}")


def replay_splice(one: Recorded, encoder: PromptEncoder) -> StageResult:
    """The recorded ids and image features to the embeddings that the decoder reads."""
    golden, manifest = one.golden, one.bundle.manifest
    features = list(one.array("image_features")) if golden.pictures else []
    ids = np.array(golden.input_ids, np.int64)
    (found,), _ = splice_rows([ids], [features], manifest.vision.patches, encoder.embed)
    recorded = Rounding(manifest.model.precision, Arithmetic.FLOATS).recorded[0]  # what is copied is otherwise the same
    return compared("splice", "splice", found, one.array("inputs_embeds"), Limits(recorded, recorded, None))


def _logits_of(encoder: PromptEncoder, decoder: DecoderSession, one: Recorded, embeds: np.ndarray) -> np.ndarray:
    """Embeddings ``[seq, hidden]``, and then the recorded answer token by token, to logits ``[tokens, vocab]``."""
    decoder.clear()  # a fault before this must not be one of it
    decoder.begin(1)
    prompt = NewTokens(np.array(embeds)[None], (), 0, np.array([len(embeds)]))
    along = logits_along(decoder, prompt, [one.golden.token_ids], encoder.token_embeddings(1).of)
    return np.concatenate([row.copy() for row in along])


@dataclass(frozen=True)
class Stage:
    """A stage whose numbers are rounded: what it is called, given and compared with, and how it runs."""

    name: str
    kind: StageKind
    given: GoldenArray
    wanted: GoldenArray
    rounding: Rounding
    run: Callable[[Recorded, np.ndarray], np.ndarray]


def features_stage(name: str, vision: VisionSession, rounding: Rounding) -> Stage:
    """The recorded pixels to image features."""
    run = partial(_features_of, vision)
    return Stage(name, "image features", "pixel_values", "image_features", rounding, run)


def logits_stage(name: str, encoder: PromptEncoder, decoder: DecoderSession, rounding: Rounding) -> Stage:
    """The recorded embeddings, and then the recorded answer token by token, to logits."""
    run = partial(_logits_of, encoder, decoder)
    return Stage(name, "logits", "inputs_embeds", "logits", rounding, run)


def replay_twice(stage: Stage, many: Sequence[Recorded]) -> Iterator[GoldenStage]:
    """Run a stage over all goldens, and again from inputs that were moved a little; see :mod:`.limits`."""
    runs: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    errors: dict[str, str] = {}
    for one in many:
        given, name = one.array(stage.given), one.golden.name
        try:
            found, again = stage.run(one, given), stage.run(one, moved(given, stage.rounding.dtype))
        except LlavaDeployError as error:
            errors[name] = str(error)
            continue
        runs[name] = found, again, one.array(stage.wanted)
    chances = [position_errors(again, found) for found, again, _ in runs.values()]
    limits = dict(zip(runs, stage.rounding.limits(chances), strict=True))
    for one in many:
        name = one.golden.name
        if name in errors:
            yield GoldenStage(name, failed(stage.name, stage.kind, errors[name]))
        else:
            found, _, wanted = runs[name]
            yield GoldenStage(name, compared(stage.name, stage.kind, found, wanted, limits[name]))
    whole = [run for run in runs.values() if run[0].shape == run[2].shape]
    if stage.rounding.shows_shifts and whole:
        yield GoldenStage(None, shift_stage(f"{stage.name}, shift", stage.kind, whole, stage.rounding))


def replay_tokens(many: Sequence[Recorded], noises: Sequence[float], llava: Llava, name: str) -> list[StageResult]:
    """Pictures and prompts to greedy answers, all goldens in one batch; a result for each.

    ``noises`` are the most that a logit of each golden was off by along its answer: what a near-tie is judged by.
    """
    answers = llava.generate(
        [one.golden.prompt for one in many],
        [one.pictures for one in many],
        max_new_tokens=max(len(one.golden.token_ids) for one in many),
    )
    results = []
    for one, answer, noise in zip(many, answers, noises, strict=True):
        wanted, found = one.golden.token_ids, answer.token_ids
        if answer.finish_reason == "stop" and found[-1] not in one.bundle.manifest.chat.stop_token_ids:
            wanted = wanted[: len(found)]  # at a stop string, which PyTorch does not know
        found = found[: len(wanted)]  # others of the batch go on for longer
        results.append(token_stage(name, "tokens", found, wanted, one.array("logits"), noise))
    return results


def guarded(name: str, kind: StageKind, run: Callable[[], StageResult]) -> StageResult:
    """A stage that may end in an error of ours, which is a result as well."""
    try:
        return run()
    except LlavaDeployError as error:
        return failed(name, kind, str(error))
