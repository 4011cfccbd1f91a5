"""METEOR, that of nltk with its published weights, over words of equal form or of equal stem.

The published one also matches WordNet's synonyms and splits sentences by a trained model, for which nltk needs data
that it downloads: figures from here are lower than published ones, and compare methods with each other.
"""

import re
from typing import Any

from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.meteor_score import single_meteor_score

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class _NoSynonyms:
    """A WordNet without words."""

    def synsets(self, word: str) -> list[Any]:
        return []


_TOKENIZER, _NOTHING = NLTKWordTokenizer(), _NoSynonyms()


def score(gold: str, prediction: str) -> float:
    """METEOR of exact and stem matches, from 0 to 1."""
    return float(single_meteor_score(_words(gold), _words(prediction), wordnet=_NOTHING))


def _words(text: str) -> list[str]:
    """The words and marks of a text, a sentence at a time."""
    return [word for sentence in _SENTENCE_END.split(text) for word in _TOKENIZER.tokenize(sentence)]
