"""How near written answers are to the right ones: exact match, F1 over words, ROUGE-L.

The first two as SQuAD takes them (Rajpurkar et al. 2016): in lower case, without punctuation and
articles. ROUGE-L (Lin 2004) is the F-measure of the library rouge-score, without stemming; it sees
Latin letters and digits only.
"""

import importlib.util
import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from hpcfed.errors import UserError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def check_installed() -> None:
    """Raises UserError without rouge-score."""
    if importlib.util.find_spec("rouge_score") is None:
        raise UserError(
            "evaluation.max_new_tokens: to score answers takes the package rouge-score; install it "
            "with `pip install 'hpcfed[instruct]'`."
        )


def words(text: str) -> list[str]:
    """The words that count."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def overlap(written: list[str], right: list[str]) -> float:
    """F1 over words, each counted as often as it stands there; of two empty answers 1."""
    if not written or not right:
        return float(written == right)
    common = (Counter(written) & Counter(right)).total()
    return 2 * common / (len(written) + len(right))


def score(written: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """Means over pairs of answers, at least one; each between 0 and 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = [(words(own), words(other)) for own, other in zip(written, right, strict=True)]
    longest = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(written, right, strict=True)]
    return {
        "exact_match": float(np.mean([own == other for own, other in pairs])),
        "f1": float(np.mean([overlap(own, other) for own, other in pairs])),
        "rouge_l": float(np.mean(longest)),
    }
