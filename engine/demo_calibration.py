"""The text that calibrates the demo model: Python's own manual, and a few conversations."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLE_TOKENS, SAMPLES = 256, 9


def calibration(tokenizer: "PreTrainedTokenizerFast") -> list[list[int]]:
    """Token ids of SAMPLES pieces, each SAMPLE_TOKENS long. Every Python installation has the manual."""
    texts = [str(tokenizer.apply_chat_template(messages, tokenize=False)) for messages in conversations()]
    chat = tokenizer("".join(texts))["input_ids"]
    pieces = list(_pieces(chat))
    # The longest topics are prose rather than grammar; one piece of each.
    for topic in manual():
        if len(pieces) >= SAMPLES:
            break
        pieces += list(_pieces(tokenizer(topic[: SAMPLE_TOKENS * 8])["input_ids"]))[:1]
    return pieces


def conversations() -> Iterator[list[dict[str, str]]]:
    """As messages, shortest form: a question and its answer."""
    for ask, answer in _CONVERSATIONS:
        yield [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]


def manual() -> Iterator[str]:
    """Topics of Python's manual, the longest first."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics, key=lambda each: -len(topics[each])))


def _pieces(ids: Sequence[int]) -> Iterator[list[int]]:
    yield from (list(ids[at : at + SAMPLE_TOKENS]) for at in range(0, len(ids) - SAMPLE_TOKENS + 1, SAMPLE_TOKENS))


_CONVERSATIONS = (
    (
        "What is a glacier, and how does it move?",
        "A glacier is a large mass of ice that forms where more snow falls in winter than melts in summer. Over many "
        "years the snow is pressed together under its own weight until it turns into dense blue ice. Once the ice is "
        "thick enough, gravity pulls it slowly downhill. Glaciers move in two ways: the ice itself bends and flows, and "
        "the whole mass slides over a thin film of water at its base. Most glaciers move less than a metre a day.",
    ),
    (
        "Can you give me a simple recipe for tomato soup?",
        "Of course! Here is a simple recipe that serves four people.\n\n1. Chop one onion and two cloves of garlic, and "
        "cook them gently in a little olive oil for five minutes.\n2. Add 800 grams of chopped tomatoes, half a litre of "
        "vegetable stock and a pinch of sugar.\n3. Simmer for twenty minutes, then blend until smooth.\n4. Season with "
        "salt, pepper and fresh basil, and serve with warm bread.",
    ),
    (
        "Write a short story about a lighthouse keeper.",
        "Old Tomas had kept the light at Gull Point for thirty years. Every evening he climbed the hundred and twelve "
        "steps, lit the lamp, and watched the beam sweep across the dark water. One night, in the middle of a terrible "
        "storm, he saw a small boat drifting towards the rocks. He rang the bell until his arms ached, and at last the "
        'boat turned. In the morning a young woman knocked at his door. "I only wanted to say thank you," she said. '
        '"My father told me you would be awake."',
    ),
    (
        "Explain the difference between a list and a tuple in Python.",
        "In Python, both lists and tuples hold a sequence of items, but a list can be changed after it is made and a "
        "tuple cannot. You write a list with square brackets, such as `numbers = [1, 2, 3]`, and a tuple with "
        "parentheses, such as `point = (4, 5)`. Use a list when items will be added or removed, and a tuple when the "
        "values belong together and should stay as they are. Because a tuple cannot change, it can be used as the key of "
        "a dictionary.",
    ),
    (
        "Why is the sky blue?",
        "The sky looks blue because of the way sunlight is scattered by the air. Sunlight contains all the colours of "
        "the rainbow, and each colour has its own wavelength. The molecules of the atmosphere scatter short wavelengths, "
        "such as blue, much more strongly than long ones, such as red. As a result, blue light reaches our eyes from "
        "every part of the sky. At sunset the light travels a longer way through the air, most of the blue is lost, and "
        "the sky turns orange and red.",
    ),
    (
        "Help me write a polite email asking for a day off.",
        "Subject: Request for a day off on Friday, 14 March\n\nDear Ms. Carter,\n\nI would like to ask for a day of "
        "leave on Friday, 14 March, for a family matter. I have finished the monthly report, and Daniel has agreed to "
        "answer any urgent questions while I am away. Please let me know if this would cause any difficulty, and I will "
        "be glad to find another date.\n\nThank you for your understanding.\n\nKind regards,\nAnna Novak",
    ),
    (
        "Who was Marie Curie?",
        "Marie Curie was a physicist and chemist who was born in Warsaw in 1867 and worked for most of her life in "
        "Paris. Together with her husband Pierre she discovered the elements polonium and radium. She was the first "
        "woman to win a Nobel Prize, and the first person to win it in two different sciences: in physics in 1903 and in "
        "chemistry in 1911. During the First World War she organised small X-ray units that helped doctors to treat "
        "wounded soldiers. She died in 1934.",
    ),
    (
        "A train travels 180 kilometres in 2 hours. How far does it go in 5 hours at the same speed?",
        "First find the speed of the train. It travels 180 kilometres in 2 hours, so its speed is 180 / 2 = 90 "
        "kilometres per hour. In 5 hours at that speed it travels 90 * 5 = 450 kilometres. The answer is 450 kilometres.",
    ),
    (
        "What can I do to sleep better?",
        "Good sleep often depends on small habits. Try to go to bed and get up at the same time every day, even on "
        "weekends. Keep your bedroom cool, dark and quiet, and avoid bright screens for an hour before you lie down. "
        "Coffee and large meals late in the evening make it harder to fall asleep, while a walk in daylight helps. If "
        "you cannot sleep after twenty minutes, get up, read something calm, and go back to bed when you feel tired.",
    ),
    (
        "Summarise the history of Rome in a few sentences.",
        "According to legend, Rome was founded in 753 BC by the twin brothers Romulus and Remus. It was first ruled by "
        "kings, and became a republic in 509 BC, governed by elected magistrates and the Senate. Over the next centuries "
        "Rome conquered Italy and then most of the lands around the Mediterranean Sea. After a series of civil wars, "
        "Augustus became the first emperor in 27 BC. The empire in the west ended in 476 AD, while the eastern half, "
        "with its capital at Constantinople, lasted until 1453.",
    ),
)
