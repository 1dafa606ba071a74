"""What captions cost: exact sums of the ledger that lies beside the kept answers.

Every paid attempt is one entry, useful or not, so the sums are what the service counted and not an estimate. Money is
stated only where a price is given: prices change, and a price list in the code would be wrong soon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from hedwig.answers import AnswerStore, Kept

__all__ = ["spending", "spending_of"]


def spending(
    answers: str,
    keys: Iterable[str] | None = None,
    *,
    usd_per_million_input: float | None = None,
    usd_per_million_output: float | None = None,
) -> dict[str, int | float | None]:
    """Sums over the answers of `keys`, or of the whole folder.

    Args:
        answers: folder of an `AnswerStore`.
        keys: which of its questions.
        usd_per_million_input: price of prompt tokens; for a batch job the batch's price.
        usd_per_million_output: price of completion tokens.

    Returns:
        num_answers (questions with a usable answer), num_requests (paid ones), num_troubles (of these, of no use),
        prompt_tokens, completion_tokens, and cost_usd, None unless both prices are known.
    """
    return _stated(AnswerStore(answers).total(keys), usd_per_million_input, usd_per_million_output)


def spending_of(
    hashes: Iterable[str],
    answers_about: Callable[[str], dict[str, Kept]],
    *,
    usd_per_million_input: float | None = None,
    usd_per_million_output: float | None = None,
) -> dict[str, int | float | None]:
    """The same sums over the questions about some images; each kept answer is read once.

    Args:
        hashes: content hashes of the images; one that occurs twice was asked about once.
        answers_about: gives question key -> what is kept, for one of them.
        usd_per_million_input: as in `spending`.
        usd_per_million_output: as in `spending`.
    """
    sums: dict[str, float] = {}
    with ThreadPoolExecutor(16) as pool:  # object storage takes its time for each
        for found in pool.map(answers_about, sorted(set(hashes))):
            for kept in found.values():
                sums["num_answers"] = sums.get("num_answers", 0) + (kept.answer is not None)
                for attempt in kept.spent:
                    for name, value in attempt.items():
                        if name != "id":
                            sums[name] = sums.get(name, 0) + value
    return _stated(sums, usd_per_million_input, usd_per_million_output)


def _stated(
    total: dict[str, float], usd_per_million_input: float | None, usd_per_million_output: float | None
) -> dict[str, int | float | None]:
    names = ("num_answers", "num_requests", "num_troubles", "prompt_tokens", "completion_tokens")
    sums: dict[str, int | float | None] = {name: int(total.get(name, 0)) for name in names}
    cost = None
    if usd_per_million_input is not None and usd_per_million_output is not None:
        cost = (
            total.get("prompt_tokens", 0) * usd_per_million_input
            + total.get("completion_tokens", 0) * usd_per_million_output
        ) / 1e6
    return {**sums, "cost_usd": cost}
