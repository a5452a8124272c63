"""Prompts become the ids that LLaVA's ``tokenizer_image_token`` and transformers' processor make of them."""

import random

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from llava_deploy.engines.contract import IMAGE_TOKEN_INDEX
from llava_deploy.engines.errors import PromptError
from llava_deploy.engines.manifest import ChatRecipe
from llava_deploy.runtime.tokenize import tokenize_prompt

PLACEHOLDER = "<image>"
CORPUS = ["USER: What is this? ASSISTANT: A cat.", "the cat sat on the mat", "How many shapes are there?\nThree."] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]


def finish(tokenizer, begin):
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    tokenizer.add_tokens([AddedToken(PLACEHOLDER, normalized=False, special=True)])
    return tokenizer


def llama_style(begin=True):
    """What a converted sentencepiece tokenizer is: a space before the text, ▁ for spaces, bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL + byte_tokens))
    return finish(tokenizer, begin)


def byte_style(begin=True):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return finish(tokenizer, begin)


def wrapped(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def recipe(tokenizer, tokenization):
    image_token_id = tokenizer.token_to_id(PLACEHOLDER)
    bos = tokenizer.token_to_id("<s>")
    return ChatRecipe(None, "vicuna_v1", PLACEHOLDER, tokenization, image_token_id, bos, "<s>", "</s>", (2,), ())


STYLES = {
    "llama": llama_style(),
    "llama without BOS": llama_style(begin=False),
    "bytes": byte_style(),
    "bytes without BOS": byte_style(begin=False),
}
PIECES = [
    "USER: ",
    "What is this?",
    "\n",
    " ",
    "  ",
    "<image",
    ">",
    "café €",
    "👩‍🚀",
    "cat",
    "</s>",
    " ASSISTANT:",
    "\t",
]


def draw_prompt(draw):
    pieces = [PLACEHOLDER if draw.random() < 0.3 else draw.choice(PIECES) for _ in range(draw.randrange(9))]
    return "".join(pieces)


PROMPTS = [
    "",
    PLACEHOLDER,
    PLACEHOLDER * 3,
    f"{PLACEHOLDER}\nWhat?",
    f"What? {PLACEHOLDER}",
    f"A {PLACEHOLDER} and {PLACEHOLDER} .",
    *(draw_prompt(random.Random(seed)) for seed in range(250)),
]


def original(prompt, tokenizer):
    """LLaVA's rule in other words: each stretch between placeholders is a text of its own; of BOS, only the first."""
    stretches = [tokenizer(text).input_ids for text in prompt.split(PLACEHOLDER)]
    with_bos = bool(stretches[0]) and stretches[0][0] == tokenizer.bos_token_id
    ids = [tokenizer.bos_token_id] if with_bos else []
    for number, stretch in enumerate(stretches):
        ids += [IMAGE_TOKEN_INDEX] if number else []
        ids += stretch[1:] if with_bos else stretch
    return ids


@pytest.mark.parametrize("style", STYLES)
def test_split_is_the_original(style):
    tokenizer, reference = STYLES[style], wrapped(STYLES[style])
    for prompt in PROMPTS:
        got = tokenize_prompt(prompt, tokenizer, recipe(tokenizer, "split"))
        assert got.dtype == np.int64
        assert got.tolist() == original(prompt, reference), prompt


@pytest.mark.parametrize("style", STYLES)
def test_added_token_is_transformers(style):
    tokenizer, reference = STYLES[style], wrapped(STYLES[style])
    image = tokenizer.token_to_id(PLACEHOLDER)
    for prompt in PROMPTS:
        expected = [IMAGE_TOKEN_INDEX if i == image else i for i in reference(prompt).input_ids]
        assert tokenize_prompt(prompt, tokenizer, recipe(tokenizer, "added_token")).tolist() == expected, prompt


def test_added_token_is_the_processor_with_its_repeated_placeholders():
    tokenizer = STYLES["llama"]
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        wrapped(tokenizer),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    prompt = f"USER: {PLACEHOLDER}\nWhat is {PLACEHOLDER}? ASSISTANT:"
    pictures = [np.zeros((8, 8, 3), np.uint8)] * 2
    expected = processor(text=prompt, images=pictures).input_ids[0]
    image = tokenizer.token_to_id(PLACEHOLDER)
    ids = tokenize_prompt(prompt, tokenizer, recipe(tokenizer, "added_token")).tolist()
    assert [i for token in ids for i in ([image] * 4 if token == IMAGE_TOKEN_INDEX else [token])] == expected


@pytest.mark.parametrize("tokenization", ["split", "added_token"])
@pytest.mark.parametrize("style", ["llama", "bytes"])
def test_a_prompt_that_begins_with_bos_gets_no_second_one(style, tokenization):
    tokenizer, reference = STYLES[style], wrapped(STYLES[style])
    bos = reference.bos_token_id
    prompt = f"<s>[INST] {PLACEHOLDER}\nWhat? [/INST] A cat. </s><s>[INST] Sure? [/INST]"
    ids = tokenize_prompt(prompt, tokenizer, recipe(tokenizer, tokenization)).tolist()
    assert ids[0] == bos
    assert ids[1] != bos
    assert ids.count(bos) == 2
    template = "{{ messages[0]['content'] }}"
    message = [{"role": "user", "content": prompt.replace(PLACEHOLDER, "|")}]
    expected = reference.apply_chat_template(message, chat_template=template, return_dict=False)
    got = tokenize_prompt(prompt.replace(PLACEHOLDER, "|"), tokenizer, recipe(tokenizer, tokenization)).tolist()
    assert got == expected


@pytest.mark.parametrize("tokenization", ["split", "added_token"])
def test_nothing_is_cut_or_padded(tokenization):
    tokenizer = llama_style()
    prompt = "the cat " * 40
    whole = tokenize_prompt(prompt, tokenizer, recipe(tokenizer, tokenization)).tolist()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=500)
    assert tokenize_prompt(prompt, tokenizer, recipe(tokenizer, tokenization)).tolist() == whole
    assert len(whole) > 40


def test_a_placeholder_that_the_tokenizer_does_not_know_is_refused():
    bare = Tokenizer(models.BPE({"<": 0, "i": 1}, []))
    wrong = ChatRecipe(None, "plain", "<i", "added_token", 7, None, None, None, (), ())
    with pytest.raises(PromptError, match="token 7 for each of the 1 placeholders '<i', the tokenizer gives 0"):
        tokenize_prompt("<i", bare, wrong)


@pytest.mark.parametrize("tokenization", ["split", "added_token"])
@pytest.mark.parametrize("prompt", [None, b"bytes", 3, ["list"], "half a pair \ud800"])
def test_what_is_no_text_is_refused(prompt, tokenization):
    tokenizer = STYLES["bytes"]
    with pytest.raises(PromptError, match=r"^prompt: "):
        tokenize_prompt(prompt, tokenizer, recipe(tokenizer, tokenization))
