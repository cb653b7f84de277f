import numpy as np
import pytest

from pipeline.errors import StoreError
from pipeline.format import Manifest, length_histogram, token_dtype


def test_histogram_counts_every_length_once_in_its_power_of_two():
    lengths = np.array([1, 1, 2, 3, 4, 7, 8, 1 << 33])
    histogram = length_histogram(lengths)
    assert sum(histogram) == len(lengths)
    assert histogram[:4] == [2, 2, 2, 1]
    assert histogram[33] == 1 and len(histogram) == 34


def test_ids_of_the_whole_vocabulary_fit_the_token_type():
    for vocab_size in (2, 1 << 16, (1 << 16) + 1, 200_000):
        assert np.iinfo(token_dtype(vocab_size)).max >= vocab_size - 1


def test_missing_store_says_what_to_do(tmp_path):
    with pytest.raises(StoreError, match="slw-prep build"):
        Manifest.load(tmp_path / "none")
    with pytest.raises(StoreError, match="no manifest"):
        Manifest.load(tmp_path)
