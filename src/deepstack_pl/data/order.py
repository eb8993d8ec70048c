"""Permutations that are functions of a text, in any version of numpy."""

import hashlib

import numpy as np
from jaxtyping import Int
from numpy import ndarray


def draws(n: int, text: str) -> ndarray:
    """``n`` raw 64-bit numbers of Philox, which no numpy release may change."""
    key = hashlib.sha256(text.encode()).digest()
    return np.random.Philox(key=np.frombuffer(key[:16], "<u8")).random_raw(n)


def shuffled(n: int, text: str) -> Int[ndarray, " n"]:
    """The permutation of ``n`` numbers that ``text`` names."""
    return np.argsort(draws(n, text), kind="stable")


def order(n: int, seed: int, epoch: int) -> Int[ndarray, " n"]:
    """A permutation by seed alone, whatever is permuted: it says which records are held out."""
    return shuffled(n, f"1 {seed} {epoch} {n}")


def shuffled_within(n: int, window: int, text: str) -> Int[ndarray, " n"]:
    """A permutation in which the numbers of every ``window`` change places among themselves."""
    return np.lexsort((draws(n, text), np.arange(n) // window))


def blocks(n: int, block: int, window: int, text: str) -> Int[ndarray, " n"]:
    """Blocks of ``block`` neighbours permuted, then the samples within every ``window``."""
    first = shuffled(-(-n // block), f"{text} blocks") * block
    spread = (first[:, None] + np.arange(block)).reshape(-1)
    spread = spread[spread < n]
    return spread[shuffled_within(n, window, f"{text} windows")]
