"""Training batches: scenes drawn, asked about and padded."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from llava_deploy.engines.contract import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_deploy.exporter.demo.conversations import ConversationWriter, Course
from llava_deploy.exporter.demo.model import GRID, to_pixels
from llava_deploy.exporter.demo.scenes import COLOURS, SHAPES, Scene, Split, Thing, random_scene

_COLOURS = tuple(COLOURS)
PATCH_WORDS = (SHAPES, _COLOURS, ("top", "bottom"), ("left", "right"))


@dataclass(frozen=True)
class Batch:
    """Right-padded rows and their pictures, in the rows' order."""

    input_ids: torch.Tensor  # [rows, seq] int64, IMAGE_TOKEN_INDEX for each picture
    labels: torch.Tensor  # [rows, seq] int64
    pixels: torch.Tensor  # [pictures, 3, height, width]
    objects: torch.Tensor  # [pictures, patches, groups], see `objects_by_patch`
    mentions: torch.Tensor  # [mentions, 2], row and, the picture's features counted, column of a name in a question
    mentioned: torch.Tensor  # [mentions, groups], the object that bears it, as in `objects`


def random_scenes(count: int, rng: random.Random) -> list[Scene]:
    """Training scenes."""
    return [random_scene(Split.TRAIN, rng) for _ in range(count)]


def scene_pixels(scenes: list[Scene]) -> torch.Tensor:
    """The scenes' pictures as pixels, `[scenes, 3, height, width]`."""
    return to_pixels([scene.picture() for scene in scenes])


def objects_by_patch(scenes: list[Scene]) -> torch.Tensor:
    """Which of PATCH_WORDS say what is in each patch's cell: int64 `[scenes, patches, groups]`.

    The number one past a group's last word says that none of them does: nothing is there, or it is in the middle.
    """
    nothing = torch.tensor([len(words) for words in PATCH_WORDS])
    cells = nothing.repeat(len(scenes), 9, 1)  # [scenes, cells, groups]
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            cells[index, thing.cell] = torch.tensor(_words(thing))
    grid = cells.view(-1, 3, 3, len(PATCH_WORDS))
    return grid.repeat_interleave(GRID // 3, dim=1).repeat_interleave(GRID // 3, dim=2).flatten(1, 2)


def _words(thing: Thing) -> list[int]:
    row, column = divmod(thing.cell, 3)
    return [SHAPES.index(thing.shape), _COLOURS.index(thing.colour), (0, 2, 1)[row], (0, 2, 1)[column]]


def conversation_batch(writer: ConversationWriter, course: Course, pad: int, rng: random.Random) -> Batch:
    """Conversations about random training scenes; `pad` is the padding's token id."""
    rows, pictures = course.rows, course.pictures
    scenes = random_scenes(rows * pictures, rng)
    written = [writer.write(tuple(scenes[row * pictures : (row + 1) * pictures]), course, rng) for row in range(rows)]
    longest = max(len(conversation.ids) for conversation in written)
    input_ids = torch.full((rows, longest), pad)
    labels = torch.full((rows, longest), IGNORE_INDEX)
    mentions: list[tuple[int, int]] = []
    for row, conversation in enumerate(written):
        for index, _ in conversation.mentions:
            before = conversation.ids[:index].count(IMAGE_TOKEN_INDEX)
            mentions.append((row, index + before * (GRID * GRID - 1)))
        length = len(conversation.ids)
        input_ids[row, :length] = torch.tensor(conversation.ids)
        labels[row, :length] = torch.tensor(conversation.labels)
    named = [_words(thing) for conversation in written for _, thing in conversation.mentions]
    return Batch(
        input_ids,
        labels,
        scene_pixels(scenes),
        objects_by_patch(scenes),
        torch.tensor(mentions, dtype=torch.long).view(-1, 2),
        torch.tensor(named, dtype=torch.long).view(-1, len(PATCH_WORDS)),
    )
