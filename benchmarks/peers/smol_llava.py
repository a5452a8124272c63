"""The model and the task that all peers are given: smol-llava, its decoder alone, and two questions.

    python smol_llava.py SmolLM2-135M-Instruct.Q4_1.gguf MODEL TEXT TASK

MODEL is a LLaVA in the llava-hf layout, float32: a CLIP ViT-B/16 tower and a two-layer projector, both random, before
SmolLM2's trained decoder; TEXT is that decoder alone; TASK gets task.json and two pictures. What it says of pictures
means nothing; speed, memory and agreement token by token are real.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from smollm2_llava import PLACEHOLDER, VIT_B, make_model, picture_settings
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

QUESTION = (
    "Describe this picture in detail: say what is in the foreground, what is in the background, and which colours "
    "stand out the most."
)
WORDS = (
    "The ferry leaves the harbour at seven each morning, past the long stone pier and the fishing boats, and it is "
    "back before dark with letters, bread, tools and a few tired people who look for the lights of their houses."
).split()
BEGIN, OTHER_BEGIN = "<|im_start|>", "<|im_end|>"
TOWER, HUB_TOWER = "vision_tower.", "vision_tower.vision_model."


def draw_picture() -> Image.Image:
    """Smooth colours and some grain, of just the tower's size: rules of resizing cannot make peers differ."""
    side = VIT_B.side
    down, right = np.mgrid[0:side, 0:side] / side
    waves = 0.5 + 0.5 * np.sin(18 * right) * np.cos(11 * down)
    grain = np.random.default_rng(0).normal(0, 0.05, (side, side, 3))
    colours = np.stack([right, down, waves], axis=-1) + grain
    return Image.fromarray((colours.clip(0, 1) * 255).astype(np.uint8))


@torch.no_grad()
def fit_projector(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> None:
    """Scale the random projector's output to the token embeddings' spread, which the decoder was trained on."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    patches = tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
    factor = model.get_input_embeddings().weight.std() / projector(patches).std()
    projector.linear_2.weight.mul_(factor)
    projector.linear_2.bias.mul_(factor)


def save_model(model: LlavaForConditionalGeneration, output: Path) -> None:
    """Write it with the names of published llava-hf checkpoints, which every converter knows."""
    output.mkdir(parents=True)
    tensors = {}
    for name, value in model.state_dict().items():
        hub = name.removeprefix("model.")
        if hub.startswith(TOWER) and not hub.startswith(HUB_TOWER):
            hub = HUB_TOWER + hub.removeprefix(TOWER)
        hub = hub.replace("language_model.", "language_model.model.", 1)
        if name != "lm_head.weight":  # tied to the embeddings
            tensors[hub] = value.contiguous()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(output)
    model.generation_config.save_pretrained(output)


def save_decoder(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    decoder = LlamaForCausalLM(model.config.text_config)
    decoder.model.load_state_dict(model.model.language_model.state_dict())
    decoder.tie_weights()
    decoder.generation_config = model.generation_config
    decoder.save_pretrained(output)
    tokenizer.save_pretrained(output)


def text_prompt(tokenizer: PreTrainedTokenizerFast, tokens: int) -> str:
    """A prompt without a picture, of so many tokens."""
    ids: list[int] = []
    for words in itertools.accumulate(itertools.cycle(WORDS), "{} {}".format):
        text = f"{BEGIN}user\n{words}"
        ids = tokenizer(text).input_ids
        if len(ids) == tokens:
            return text
        if len(ids) > tokens:
            break
    raise ValueError(f"no prompt of {tokens} tokens: these words give {len(ids)}; put others into WORDS")


def write_task(processor: LlavaProcessor, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Both questions; the one to warm up with is as long, and differs from its first token and pixel on."""
    output.mkdir(parents=True, exist_ok=True)
    picture = draw_picture()
    shown = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": shown}], add_generation_prompt=True, tokenize=False
    )
    ids = processor(images=picture, text=prompt, return_tensors="pt").input_ids[0].tolist()
    text = text_prompt(tokenizer, len(ids))
    questions = {}
    for name, begin, image in (
        ("timed", BEGIN, picture),
        ("warm_up", OTHER_BEGIN, picture.transpose(Image.Transpose.ROTATE_180)),
    ):
        file = f"{name}.png"
        image.save(output / file)
        first = tokenizer.convert_tokens_to_ids(begin)
        questions[name] = {
            "prompt": prompt.replace(BEGIN, begin, 1), "ids": [first, *ids[1:]], "image": file,
            "text_prompt": text.replace(BEGIN, begin, 1), "text_ids": [first, *tokenizer(text).input_ids[1:]],
        }  # fmt: skip
    placeholder = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    facts = {"prompt_tokens": len(ids), "image_tokens": ids.count(placeholder)}
    (output / "task.json").write_text(json.dumps({**facts, "questions": questions}), encoding="utf-8")
    print(f"prompt of {facts['prompt_tokens']} tokens, {facts['image_tokens']} of them the picture's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("task", type=Path)
    given = parser.parse_args()
    model, tokenizer = make_model(given.gguf, VIT_B)
    settings = picture_settings(VIT_B)
    processor = LlavaProcessor(
        image_processor=settings, tokenizer=tokenizer, patch_size=VIT_B.patch, image_token=PLACEHOLDER,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    fit_projector(model, settings(draw_picture(), return_tensors="pt").pixel_values)
    save_model(model, given.model)
    processor.save_pretrained(given.model)
    settings.save_pretrained(given.model)  # OpenVINO GenAI reads this file, and without it crops to 336 pixels
    save_decoder(model, tokenizer, given.text)
    write_task(processor, tokenizer, given.task)


if __name__ == "__main__":
    main()
