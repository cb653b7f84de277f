"""What an input file is known by, besides its name and size."""

import shutil

from pipeline.fingerprint import FILES, fingerprints
from pipeline.inputs import InputFile


def look(*paths):
    return fingerprints([InputFile(str(path), path.stat().st_size, "text") for path in paths])


def test_a_change_of_the_start_the_end_or_all_of_a_file_is_seen_and_a_copy_is_the_same(tmp_path):
    for size in (0, 1, 4096, 4097, 60_000, 1 << 20):
        path = tmp_path / f"{size}.txt"
        path.write_bytes(bytes(size))
        shutil.copy(path, tmp_path / "copy")
        first = look(path)
        assert look(tmp_path / "copy") == first
        for at in {0, size // 2 if size <= 60_000 else 0, size - 1} if size else ():
            path.write_bytes(bytes(at) + b"x" + bytes(size - at - 1))
            assert look(path) != first


def test_urls_and_standard_input_are_not_read_and_of_very_many_files_some(tmp_path):
    assert fingerprints([InputFile("-", -1, "jsonl"), InputFile("s3://b/x", 9, "jsonl")]) == ["", ""]
    (tmp_path / "a").write_text("a")
    many = look(*[tmp_path / "a"] * (2 * FILES + 1))
    assert sum(map(bool, many)) == -(-(2 * FILES + 1) // 3)
