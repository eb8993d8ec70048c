"""How VQA's scorers write an answer before they compare it.

The rules and tables are those of the official scorer (github.com/GT-Vision-Lab/VQA, vqaEval.py) and of the challenges'
server, as MMF has them (github.com/facebookresearch/mmf, EvalAIAnswerProcessor), their oddities included.
"""

import re

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = int(re.UNICODE)  # the scorers pass this flag where re.sub takes how many to replace

# Contractions that the scorers know without their apostrophe, and those that they know with one of several missing.
# Those with a capital (I'm) are left out: words are in lower case by then, and never match.
_SINGLE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_SEVERAL = """
couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""
_CONTRACTIONS = (
    {word.replace("'", ""): word for word in _SINGLE.split()}
    | {word[:at] + word[at + 1 :]: word for word in _SEVERAL.split() for at, letter in enumerate(word) if letter == "'"}
    | {"somebody'd": "somebodyd"}
)


def one_line(text: str) -> str:
    """``text`` without line breaks, tabs and outer space."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def official(text: str) -> str:
    """``text`` as VQA's scorer compares it: without punctuation and articles, small numbers in digits."""
    return _words(_without_punctuation(one_line(text)))


def of_server(text: str) -> str:
    """``text`` as the server compares it, which parts possessives and drops all commas first."""
    parted = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return official(parted.strip())


def _without_punctuation(text: str) -> str:
    number = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or number else " ")
    return _FULL_STOP.sub("", out, count=_MOST_FULL_STOPS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
