"""Texts that a model is shown where nobody gives others, and files of them."""

from __future__ import annotations

import json
from pathlib import Path

from quire.errors import ConfigError

USUAL_TEXTS = (
    "The harbour lay quiet before dawn. A single crane moved above the containers, and the "
    "first ferry of the day waited for its passengers with all its lights on. When the gates "
    "opened, people came down the ramp in twos and threes, holding cups of coffee and looking "
    "at nothing.",
    "Photosynthesis turns the energy of light into chemical energy. In the first stage, "
    "pigments in the membranes of the chloroplast take up light and split water, which sets "
    "oxygen free. In the second, carbon dioxide from the air is built into sugars.",
    "def moving_average(values, width):\n    if width < 1:\n        raise "
    "ValueError('width')\n    total = sum(values[:width])\n    means = [total / width]\n    "
    "for old, new in zip(values, values[width:]):\n        total += new - old\n        "
    "means.append(total / width)\n    return means\n",
    "Question: A train leaves at 9:40 and arrives at 12:15. How long does the journey take?\n"
    "Answer: From 9:40 to 12:00 it is 2 hours and 20 minutes; 15 more make 2 hours and 35 "
    "minutes.",
    '{"order": 10482, "customer": {"name": "Ada Brandt", "city": "Lyon"}, "items": [{"sku": '
    '"T-100", "count": 2, "price": 14.5}, {"sku": "K-7", "count": 1, "price": 89.0}], "paid": '
    "true}",
    "Dear Ms Okafor,\n\nthank you for your letter of 3 March. We have looked into the delay, "
    "and we are sorry: the parcel was left at the wrong depot. A new one went out this morning "
    "and should reach you on Thursday. The shipping costs have been refunded.\n\nYours "
    "sincerely,\nT. Lind",
    "Die Bibliothek hat montags geschlossen. An allen anderen Tagen kann man dort bis acht Uhr "
    "abends lesen, Bücher ausleihen und im Keller alte Zeitungen ansehen.",
    "Le marché se tient chaque samedi sur la place. On y trouve des fromages, du pain, des "
    "fleurs et, au printemps, les premières fraises de la région.",
    "To make the dough, mix 500 g of flour with a teaspoon of salt. Dissolve the yeast in 300 "
    "ml of warm water, add it slowly, and knead for ten minutes. Let it rest under a cloth "
    "until it has doubled in size; then shape it, score the top, and bake it at 230 degrees "
    "for half an hour.",
    "In 1869 the two halves of the railway met in the desert. For the workers, many of whom "
    "had come from across the ocean, the ceremony meant the end of their wages; for the "
    "newspapers it was the beginning of an age in which a letter took a week and not a season.",
    "User: My laptop gets very hot when I watch videos. What can I do?\nAssistant: First check "
    "whether the fan turns and the vents are free of dust. Then see whether the browser uses "
    "hardware decoding, since decoding on the processor takes far more power.",
    "| city | population | area |\n|---|---:|---:|\n| Quito | 1,763,000 | 372 |\n| Oslo | "
    "709,000 | 454 |\n| Perth | 2,192,000 | 6,418 |\n\nThe largest of these by area is Perth.",
    "Let x be a real number with x^2 - 5x + 6 = 0. The left side is the product of x - 2 and x "
    "- 3, so one of the two has to vanish: the solutions are x = 2 and x = 3.",
    "SELECT c.name, COUNT(*) AS orders FROM customers c JOIN orders o ON o.customer_id = c.id "
    "WHERE o.created_at >= '2024-01-01' GROUP BY c.name HAVING COUNT(*) > 3 ORDER BY orders "
    "DESC;",
    "The contract may be ended by either party with a notice of three months to the end of a "
    "quarter. Notice has to be given in writing. Claims that arose before the end stay "
    "untouched.",
    "She closed the book and listened. Somewhere below, a door was opened with great care, and "
    "then nothing: no step, no voice, only the rain. 'It is only the wind,' she said aloud, "
    "because things said aloud are easier to believe.",
)
"""A little of what people write: prose, code, questions, data, in three languages."""


def read_texts(file: Path) -> tuple[str, ...]:
    """Read texts: a JSON list of strings, JSON lines, or else a text on each line.

    Parameters
    ----------
    file
        ``.json``; ``.jsonl``, each line a string or an object with a string ``text``; any other.

    Raises
    ------
    ConfigError
        It cannot be read, has no text, or something else.
    """
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"calibration: {file} cannot be read as text: {error}") from error
    lines = [line for line in content.splitlines() if line.strip()]
    if file.suffix not in (".json", ".jsonl"):
        return _checked(file, lines)
    try:
        if file.suffix == ".json":
            return _checked(file, json.loads(content))
        return _checked(file, [_text_of(json.loads(line)) for line in lines])
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"calibration: {file} is not valid JSON: {error}") from error


def _text_of(line: object) -> object:
    return line.get("text") if isinstance(line, dict) else line


def _checked(file: Path, texts: object) -> tuple[str, ...]:
    if (
        not isinstance(texts, list)
        or not texts
        or not all(isinstance(each, str) and each.strip() for each in texts)
    ):
        raise ConfigError(
            f"calibration: {file} must have texts: one on each line, JSON lines with strings or "
            "objects with a 'text', or a JSON list of strings"
        )
    return tuple(texts)
