"""Training batches: scenes drawn, asked about and padded."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from llava_deploy.engines.contract import IGNORE_INDEX
from llava_deploy.exporter.demo.conversations import ConversationWriter
from llava_deploy.exporter.demo.model import GRID, to_pixels
from llava_deploy.exporter.demo.scenes import COLOURS, SHAPES, Scene, Split, random_scene

_COLOURS = tuple(COLOURS)


@dataclass(frozen=True)
class Batch:
    """Right-padded rows and their pictures, in the rows' order."""

    input_ids: torch.Tensor  # [rows, seq] int64, IMAGE_TOKEN_INDEX for each picture
    attention_mask: torch.Tensor  # [rows, seq] bool
    labels: torch.Tensor  # [rows, seq] int64
    pixels: torch.Tensor  # [pictures, 3, height, width]
    objects: torch.Tensor  # [pictures, patches, 2], see `objects_by_patch`


def random_scenes(count: int, rng: random.Random) -> list[Scene]:
    """Training scenes."""
    return [random_scene(Split.TRAIN, rng) for _ in range(count)]


def scene_pixels(scenes: list[Scene]) -> torch.Tensor:
    """The scenes' pictures as pixels, `[scenes, 3, height, width]`."""
    return to_pixels([scene.picture() for scene in scenes])


def objects_by_patch(scenes: list[Scene]) -> torch.Tensor:
    """The shape and the colour of the object in each patch's cell: int64 `[scenes, patches, 2]`.

    An empty cell has the numbers one past the last shape and colour.
    """
    cells = torch.tensor([len(SHAPES), len(COLOURS)]).repeat(len(scenes), 9, 1)  # [scenes, cells, 2]
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            cells[index, thing.cell, 0] = SHAPES.index(thing.shape)
            cells[index, thing.cell, 1] = _COLOURS.index(thing.colour)
    grid = cells.view(-1, 3, 3, 2).repeat_interleave(GRID // 3, dim=1).repeat_interleave(GRID // 3, dim=2)
    return grid.flatten(1, 2)


def conversation_batch(
    writer: ConversationWriter, rows: int, pictures: int, turns: int, rng: random.Random, pad: int
) -> Batch:
    """`rows` conversations, each about `pictures` pictures with `turns` questions about every one of them."""
    scenes = random_scenes(rows * pictures, rng)
    written = [writer.write(tuple(scenes[row * pictures : (row + 1) * pictures]), turns, rng) for row in range(rows)]
    longest = max(len(conversation.ids) for conversation in written)
    input_ids = torch.full((rows, longest), pad)
    labels = torch.full((rows, longest), IGNORE_INDEX)
    attention_mask = torch.zeros(rows, longest, dtype=torch.bool)
    for row, conversation in enumerate(written):
        length = len(conversation.ids)
        input_ids[row, :length] = torch.tensor(conversation.ids)
        labels[row, :length] = torch.tensor(conversation.labels)
        attention_mask[row, :length] = True
    return Batch(input_ids, attention_mask, labels, scene_pixels(scenes), objects_by_patch(scenes))
