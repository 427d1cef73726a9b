"""Prompts to train a head that drafts by, as JSONL on stdout: every way to ask about every topic, shuffled.

python benchmarks/drafting/questions.py > questions.jsonl
elinvar draft train smollm2-135m --chat --data questions.jsonl --out head
elinvar draft train smollm2-135m --chat --data questions.jsonl --method early-exit --answer-tokens 64
"""

from __future__ import annotations

import json
import random

TOPICS = [
    "the water cycle",
    "photosynthesis",
    "black holes",
    "the French Revolution",
    "bread",
    "the internet",
    "vaccines",
    "chess openings",
    "the Roman Empire",
    "machine learning",
    "sleep",
    "earthquakes",
    "coffee",
    "the printing press",
    "electric cars",
    "climate change",
    "honey bees",
    "the moon",
    "volcanoes",
    "democracy",
    "inflation",
    "poetry",
    "the Silk Road",
    "jazz",
    "gardening",
    "glaciers",
    "the human heart",
    "binary search",
    "recycling",
    "public libraries",
    "mountain climbing",
    "antibiotics",
    "the Great Wall",
    "sailing",
    "tea",
    "robots",
    "dinosaurs",
    "bicycles",
    "solar panels",
    "time management",
    "friendship",
    "Mozart",
    "the stock market",
    "deserts",
    "whales",
    "rainbows",
    "cooking pasta",
    "learning a language",
]
WAYS = (
    "Explain {} in simple words.",
    "Write a short story about {}.",
    "Give me five facts about {}.",
    "What are common misconceptions about {}?",
    "Write an email to a friend about {}.",
    "Summarise the history of {}.",
    "Why is {} important?",
    "Write a poem about {}.",
    "List the pros and cons of {}.",
    "How would you teach {} to a child?",
    "Write three quiz questions with answers about {}.",
    "Give step-by-step advice for someone new to {}.",
    "Compare {} with something similar.",
    "What questions should I ask about {}?",
)


def main() -> None:
    questions = [way.format(topic) for way in WAYS for topic in TOPICS]
    random.Random(0).shuffle(questions)
    for question in questions:
        print(json.dumps({"prompt": question}))


if __name__ == "__main__":
    main()
