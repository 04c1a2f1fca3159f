"""Answers that tests of metrics share: odd ones, and random ones near what models say."""

import random

ODD = [
    "",
    " ",
    "Yes.",
    "yes, it is",
    "No, not visible",
    "NO",
    "\nno\n",
    "no\tdog",
    "Y",
    "n.",
    ".yes",
    "I do not know",
    "yes and no",
    "🙂",
    "не видно",
    "没有",
    "İstanbul ẞ",
    "\x00",
    "A\u00a0B",
    ".",
    ",",
    "1,000",
    "1,,2",
    "5%",
    "%",
    "nan",
    "-inf",
    "1e400",
    "it's the dog's, isnt it?",
    "." * 50,
    "x" * 10_000,
    "no " * 3_333,
]

_PIECES = ["yes", "no", "not", "a", "the", "two", "dog", "dont", "cat's", "10", "1,000", "3.5", "0", "42%", "Yes", "No"]
_GLUE = [" ", " ", " ", ", ", ". ", ".", ",", "-", "  ", "\n", "/", "?", "! ", "'"]


def random_answers(n: int, seed: int = 0) -> list[str]:
    """`n` short texts with the words, numbers and marks that metrics treat in a way of their own."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        parts = [rng.choice(_PIECES) + rng.choice(_GLUE) for _ in range(rng.randint(1, 4))]
        text = "".join(parts)
        texts.append(text if rng.random() < 0.4 else text.rstrip(" ,.-\n/?!'"))
    return texts
