"""Writes the example datasets, all of them our own: `python examples/make_datasets.py`.

Three shapes of very different lengths: ticket_labels.jsonl (prompt/completion, very short), support_replies.jsonl
(messages, medium) and release_notes.jsonl (text, long).
"""

import itertools
import json
import random
from pathlib import Path

HERE = Path(__file__).parent

_ISSUES = {
    "billing": ["I was charged twice for {item}", "the invoice for {item} shows the wrong address",
                "my refund for {item} has not arrived", "the discount code did not apply to {item}"],
    "delivery": ["the parcel with {item} is late", "tracking for {item} has not moved in days",
                 "{item} went to my old address", "the courier left {item} in the rain"],
    "defect": ["{item} stopped working after a week", "{item} arrived with a crack",
               "{item} makes a grinding noise", "a screw of {item} is missing"],
    "account": ["I cannot log in to order {item}", "please delete my account after {item} ships",
                "the reset mail never came and I want {item}", "my profile shows somebody else's {item}"],
}  # fmt: skip
_ITEMS = ["a bike lamp", "the touring saddle", "two inner tubes", "a rain cape", "the cargo rack", "a chain guard"]
_STEPS = {
    "billing": "I have asked our accounts desk to check the payment; you will see the correction within two days.",
    "delivery": "I have opened a search with the courier; you will hear from me by tomorrow noon.",
    "defect": "Please keep the part: a replacement leaves our workshop today, and the return label is in your inbox.",
    "account": "I have reset the lock on your account; the new link is valid for one hour.",
}
_PARTS = ["drive train", "brake lever", "display", "battery mount", "lamp controller", "companion app"]
_CHANGES = [
    "The {part} now reports its state every second instead of every minute",
    "A rare reset of the {part} after a cold night is fixed",
    "The {part} uses a third less power while the bike is parked",
    "Settings of the {part} survive a firmware update",
    "The {part} warns before its bolts work loose",
]


def tickets() -> list[tuple[str, str, str]]:
    """(label, item, sentence) for every combination, in a fixed shuffled order."""
    rows = [
        (label, item, template.format(item=item))
        for label, templates in _ISSUES.items()
        for template, item in itertools.product(templates, _ITEMS)
    ]
    random.Random(7).shuffle(rows)
    return rows


def ticket_labels() -> list[dict[str, str]]:
    return [{"prompt": f"Ticket: {text}.\nQueue:", "completion": f" {label}"} for label, _, text in tickets()]


def support_replies() -> list[dict[str, list[dict[str, str]]]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Hello, {text}. What now?"},
                {
                    "role": "assistant",
                    "content": f"Dear rider, thank you for writing about {item}. {_STEPS[label]} "
                    "Ride safely, Mira from Fernwood Bikes.",
                },
            ]
        }
        for label, item, text in tickets()
    ]


def release_notes() -> list[dict[str, str]]:
    choose = random.Random(11)
    notes = []
    for number in range(72):
        parts = choose.sample(_PARTS, 4)
        lines = [f"- {choose.choice(_CHANGES).format(part=part)}." for part in parts[: choose.randint(2, 4)]]
        head = f"Fernwood firmware {3 + number // 24}.{number % 24}\n\nWhat is new:\n"
        tail = f"\n\nUpdate over the air with the bike at rest; it takes about {choose.randint(2, 9)} minutes."
        notes.append({"text": head + "\n".join(lines) + tail})
    return notes


def main() -> None:
    for name, rows in (
        ("ticket_labels", ticket_labels()),
        ("support_replies", support_replies()),
        ("release_notes", release_notes()),
    ):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
