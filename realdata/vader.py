# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Sentences with human ratings of their sentiment, from the source distribution of the PyPI package `vaderSentiment`.

The data are those of C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text", ICWSM 2014. Please cite them if you publish results on them.
"""

from __future__ import annotations

import html
import os
import random
import tarfile

from pypi_assets import asset_folder, create_once, pip_download


FILES = {
    "movie": "movieReviewSnippets_GroundTruth.txt",  # 10,605 sentences
    "product": "amazonReviewSnippets_GroundTruth.txt",  # 3,708
    "editorial": "nytEditorialSnippets_GroundTruth.txt",  # 5,190
    "tweet": "tweets_GroundTruth.txt",  # 4,200
}


def load_sentences(domain: str = "movie", cache_dir: str | os.PathLike | None = None) -> list[tuple[str, float]]:
    """
    All sentences of one domain, in the order of the file.

    Args:
        domain (`str`, *optional*, defaults to `"movie"`): `"movie"`, `"product"`, `"editorial"` or `"tweet"`.
        cache_dir (`str`, *optional*): See [`pypi_assets.asset_folder`].

    Returns:
        `list[tuple[str, float]]`: Text and mean rating, from -4 (most negative) to 4 (most positive).
    """
    if domain not in FILES:
        raise ValueError(f"domain={domain!r} is unknown, choose one of {', '.join(FILES)}.")
    folder = asset_folder("vader", cache_dir)
    if not folder.is_dir():
        with create_once(folder) as scratch, pip_download("vaderSentiment==3.3.2", source=True) as sdist:
            inner_name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
            with tarfile.open(sdist) as outer, tarfile.open(fileobj=outer.extractfile(inner_name)) as inner:
                for name in FILES.values():
                    (scratch / name).write_bytes(inner.extractfile(f"hutto_ICWSM_2014/{name}").read())
    sentences = []
    # split at newlines only: splitlines() would also split at rarer characters, which stand inside sentences
    for line in (folder / FILES[domain]).read_text(encoding="utf-8").split("\n"):
        if line.strip():
            _, rating, text = line.split("\t", 2)
            sentences.append((html.unescape(text.strip()), float(rating)))
    return sentences


def sentiment_splits(
    domain: str = "movie", n_test: int = 300, seed: int = 0, cache_dir: str | os.PathLike | None = None
) -> tuple[list[dict], list[dict]]:
    """
    Train and held-out examples for telling positive from negative sentences.

    Sentences rated between -0.5 and 0.5 are neither and are left out. No text stands in both parts.

    Args:
        domain (`str`, *optional*, defaults to `"movie"`): See [`load_sentences`].
        n_test (`int`, *optional*, defaults to 300): Number of held-out examples.
        seed (`int`, *optional*, defaults to 0): Decides which are held out, and the order of both parts.
        cache_dir (`str`, *optional*): See [`pypi_assets.asset_folder`].

    Returns:
        `tuple[list[dict], list[dict]]`: Train and held-out examples `{"text": ..., "label": "positive" | "negative"}`.
    """
    examples = [
        {"text": text, "label": "positive" if rating > 0 else "negative"}
        for text, rating in load_sentences(domain, cache_dir)
        if abs(rating) >= 0.5
    ]
    if not 0 <= n_test < len(examples):
        raise ValueError(f"n_test={n_test} must be at least 0 and less than the number of sentences, {len(examples)}.")
    random.Random(seed).shuffle(examples)
    test = examples[:n_test]
    test_texts = {example["text"] for example in test}
    train = [example for example in examples[n_test:] if example["text"] not in test_texts]
    return train, test


if __name__ == "__main__":
    for domain in FILES:
        train, test = sentiment_splits(domain)
        print(f"{domain}: {len(load_sentences(domain))} sentences, {len(train)} to train on, {len(test)} held out")
        for example in test[:3]:
            print(f"  {example['label']}: {example['text']}")
