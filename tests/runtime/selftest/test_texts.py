from __future__ import annotations

from llava_deploy.runtime.selftest.texts import text_difference, token_difference


def test_equal_ones_do_not_differ() -> None:
    assert text_difference("as it is", "as it is") is None
    assert text_difference("", "") is None
    assert token_difference([1, 2], (1, 2)) is None


def test_where_texts_part_with_a_little_around_it() -> None:
    wanted = "USER: <image>\nWhat is in the picture? ASSISTANT:"
    found = wanted.replace("image>\n", "image> ")
    assert text_difference(found, wanted) == (
        r"character 13: 'SER: <image> What is in ' instead of 'SER: <image>\nWhat is in '"
    )
    assert text_difference("USER: ", "USER:") == "character 5: 'USER: ' instead of 'USER:'"
    assert text_difference("", "a") == "character 0: '' instead of 'a'"


def test_where_tokens_part() -> None:
    assert token_difference([1, 2, 3, 9, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]) == (
        "token 3 of 7: 2, 3, 9, 5, 6 instead of 2, 3, 4, 5, 6"
    )
    assert token_difference([1], [1, 2]) == "token 1 of 2: 1 instead of 1, 2"
    assert token_difference([], [7]) == "token 0 of 1: nothing instead of 7"
